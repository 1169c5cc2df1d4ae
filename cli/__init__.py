"""The folder cli/ of the checkout, installed as coeft.cli."""

if __name__ == "cli":  # imported from the checkout's root, as a top-level package
    raise ModuleNotFoundError("import coeft.cli, not cli (run pip install -e . in the checkout once)")

"""The folder conf/ of the checkout, installed as coeft.conf."""

if __name__ == "conf":  # imported from the checkout's root, as a top-level package
    raise ModuleNotFoundError("import coeft.conf, not conf (run pip install -e . in the checkout once)")

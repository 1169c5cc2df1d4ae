"""The folder recipes/ of the checkout, installed as coeft.recipes."""

if __name__ == "recipes":  # imported from the checkout's root, as a top-level package
    raise ModuleNotFoundError("import coeft.recipes, not recipes (run pip install -e . in the checkout once)")

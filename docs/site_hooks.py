"""Pages of the documentation site that are made from the code: methods, recipes, contributing."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from coeft.cli.catalogue import card, options, recipe_file, recipe_names

ROOT = Path(__file__).parent.parent
METHODS_HEAD = """# Cards of the methods

What `peft=` takes, alone or in a stack such as `peft=[coeff,lora]`; `coeft show method NAME` prints the card with the
settings and their defaults; [another page](methods.md) compares them.

"""
RECIPES_HEAD = """# Files of the recipes

The experiments that coeft ships, each with its file, whose header says what was measured, and what was not; the
[catalogue](recipes.md) has them in tables.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is written nowhere by hand."""
    made = {"method-cards.md": methods(), "recipe-files.md": recipes(), "contributing.md": contributing()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def methods() -> str:
    """The card of every method."""
    cards = [f"## {name}\n\n```text\n{card(name)}\n```\n" for name in options("peft") if name != "none"]
    return METHODS_HEAD + "\n".join(cards)


def recipes() -> str:
    """Every recipe with its file."""
    files = {name: recipe_file(name).read_text(encoding="utf-8") for name in recipe_names()}
    entries = [f"## {name}\n\n```yaml\n{text}```\n" for name, text in files.items()]
    return RECIPES_HEAD + "\n".join(entries)


def contributing() -> str:
    """CONTRIBUTING.md, which stands at the top of the repository."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

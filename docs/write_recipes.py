"""Write docs/recipes.md from the files in recipes/:

python docs/write_recipes.py
"""

from pathlib import Path

from coeft.cli.recipe_list import Entry, entries

PAGE = """# Recipes

Written by `python docs/write_recipes.py` from the headers in `recipes/`; do not edit by hand. `coeft list recipes`
prints the same in the shell.

    coeft train recipe=NAME                  runs one; the header of its file has the whole command
    coeft train recipe=NAME dry_run=true     says what it would do, and what the data is like
    coeft show recipe NAME                   prints the file
    coeft copy recipe NAME mine.yaml         a copy to edit: coeft train recipe=./mine.yaml

A number in a header was measured by us, with the date and the command beside it, or is a paper's and says so; else it
reads "not measured". Data: training and test samples. Network: what is fetched if it is not in the cache; weights can
be given as a file (`backbone.weights=FILE`) or folder (`backbone.name=FOLDER`), data as a folder.

{tables}"""
COLUMNS = ["recipe", "what it is", "task", "backbone", "stack", "data", "network", "measured"]
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def page() -> str:
    """The content of docs/recipes.md."""
    folders: dict[str, list[Entry]] = {}
    for entry in entries():
        folders.setdefault(entry.name.rpartition("/")[0] or entry.name, []).append(entry)
    tables = [f"## {folder}\n\n{HEAD}{''.join(map(row, found))}" for folder, found in folders.items()]
    return PAGE.format(tables="\n".join(tables))


def row(entry: Entry) -> str:
    """The line of a recipe."""
    header = entry.header
    cells = [
        f"`{entry.name}`", header.about, entry.task, entry.backbone, entry.stack, header.fields["Data"], entry.network,
        header.fields["Expected"] if header.is_measured else "not measured",
    ]  # fmt: skip
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |\n"


if __name__ == "__main__":
    Path(__file__).with_name("recipes.md").write_text(page(), encoding="utf-8")

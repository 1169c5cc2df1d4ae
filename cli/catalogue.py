"""coeft list, show and copy: what there is, found by listing the folders."""

import ast
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

from coeft.errors import UserError, near

from . import runs
from .arguments import Parser, write_rows

CONF = Path(str(files("coeft.conf")))
RECIPES = Path(str(files("coeft.recipes")))
METHODS = Path(str(files("coeft"))) / "methods"


def recipe_names() -> list[str]:
    """The recipes that coeft ships, such as vtab/cifar100; files that begin with _ are what several of them share."""
    return [name for name in _recipe_files() if not name.rpartition("/")[2].startswith("_")]


def _recipe_files() -> list[str]:
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def options(group: str, folder: Path = CONF) -> list[str]:
    """The options of a config group, such as vit_base of backbone."""
    root = folder / group
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe, or of what several share.

    Raises:
        UserError: there is no such recipe.
    """
    if name not in _recipe_files():
        raise UserError(f"no recipe {name!r}; {near(name, recipe_names())}")
    return RECIPES / f"{name}.yaml"


def list_main(argv: list[str]) -> int:
    """coeft list WHAT [FILTER]"""
    parser = Parser(
        "list",
        "List what there is. FILTER is a part of the name; for runs, also the folder to look in. With methods, "
        "backbone=NAME adds the number of parameters that each trains there, by its default settings or those given.",
    )
    names = [*_LISTS, "methods", "runs"]
    parser.add_argument("what", choices=sorted(names), metavar="WHAT", help=", ".join(names))
    parser.add_argument("filter", nargs="*", default=[], metavar="FILTER")
    parser.add_argument("--sort", choices=runs.SORTS, help=f"runs: by {', '.join(runs.SORTS)}; default: run")
    parser.add_argument("--reverse", action="store_true", help="runs: the other way round")
    parser.add_argument("--status", choices=["completed", "incomplete"], help="runs: these alone")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.what == "methods":
        from . import methods  # which needs the folders named here

        return methods.show(arguments.filter)
    if arguments.what == "runs":
        return runs.show(arguments)
    if arguments.sort or arguments.reverse or arguments.status:
        raise UserError(f"--sort, --reverse and --status belong to coeft list runs, not {arguments.what}")
    if len(arguments.filter) > 1:
        raise UserError(f"list: one FILTER, not {' '.join(arguments.filter)}")
    part = "".join(arguments.filter)
    rows = list(_LISTS[arguments.what](part))
    if not rows:
        raise UserError(f"no {arguments.what} match {part!r}" if part else f"no {arguments.what}")
    if arguments.what == "recipes":
        from .recipe_list import HEAD  # which needs the folders named here

        rows.insert(0, HEAD)
    write_rows(rows)
    if arguments.what == "backbones" and part:  # the whole list has a line of each
        print("any timm model: backbone=timm backbone.name=NAME", file=sys.stderr)
        print("any model of transformers: backbone=hf backbone.name=OWNER/NAME or a folder", file=sys.stderr)
    return 0


def _recipes(part: str) -> Iterator[tuple[str, ...]]:
    from .recipe_list import entries

    yield from (entry.row for entry in entries(part))


def _group(group: str) -> Callable[[str], Iterator[tuple[str, ...]]]:
    def rows(part: str) -> Iterator[tuple[str, ...]]:
        for name in options(group):
            if part in name:
                yield name, about(group, name)

    return rows


def about(group: str, option: str) -> str:
    """One line on an option: its own first comment, or what its kind's file begins with."""
    from coeft.config import FOLDERS, read_yaml

    path = CONF / group / f"{option}.yaml"
    if comment := first_comment(path):
        return comment
    settings = read_yaml(path)
    source = Path(str(files("coeft"))) / FOLDERS[group] / f"{settings.get('kind')}.py"
    first = docstring(source).partition("\n")[0] if source.is_file() else ""
    name = settings.get("name")
    return str(name) if name not in (None, "???") else first


_LISTS: dict[str, Callable[[str], Iterator[tuple[str, ...]]]] = {
    "recipes": _recipes,
    "backbones": _group("backbone"),
    "datasets": _group("data"),
}


def show_main(argv: list[str]) -> int:
    """coeft show recipe|method NAME"""
    parser = Parser("show", "Print a recipe, or a method's card and its settings.")
    parser.add_argument("what", choices=["recipe", "method"])
    parser.add_argument("name", metavar="NAME")
    arguments = parser.parse_args(argv)
    if arguments.what == "recipe":
        print(recipe_file(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    name = arguments.name
    if name not in options("peft"):
        raise UserError(f"no method {name!r}; {near(name, options('peft'))}")
    if text := card(name):
        print(text + "\n")
    lines = (CONF / "peft" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if not line.startswith(("# @package", "kind:", "{}"))]
    if values := [f"    {line}" for line in settings if not line.startswith("#")]:
        if "defaults:" in settings:
            print("A stack, with what differs from each method's defaults; settings are peft.METHOD.KEY=VALUE:")
        else:
            print(f"Settings, as peft.{name}.KEY=VALUE, with their defaults:")
        print("\n".join(values))
    return 0


def copy_main(argv: list[str]) -> int:
    """coeft copy recipe NAME [FILE]"""
    parser = Parser("copy", "Copy a recipe to a file of yours, to edit. Nothing is overwritten.")
    parser.add_argument("what", choices=["recipe"])
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("file", nargs="?", metavar="FILE", help="default: the recipe's name, in this folder")
    arguments = parser.parse_args(argv)
    text = recipe_file(arguments.name).read_text(encoding="utf-8")
    leaf = arguments.name.rpartition("/")[2] + ".yaml"
    target = Path(arguments.file or leaf).expanduser()
    if target.is_dir():
        target /= leaf
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target}: a recipe's file ends with .yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{target} exists; give another file: coeft copy recipe {arguments.name} FILE") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    print(target)
    print(f"edit it, then run: coeft train {shlex.quote(f'recipe={target}')}", file=sys.stderr)
    return 0


def card(option: str) -> str:
    """What there is to say of an option of peft: its method's card, and the comments of its own file."""
    lines = (CONF / "peft" / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comments = [line[1:].removeprefix(" ") for line in lines if line.startswith("#") and "@package" not in line]
    return "\n\n".join(text for text in (docstring_of(option), "\n".join(comments)) if text)


def docstring_of(method: str) -> str:
    """The card of a method, empty where it has none of its own."""
    path = METHODS / f"{method}.py"
    return docstring(path) if path.is_file() else ""


def docstring(path: Path) -> str:
    """The docstring of a module, read without importing it."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file, if the file begins with comments."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return ""
        if not line.startswith("# @package"):
            return line.lstrip("# ")
    return ""

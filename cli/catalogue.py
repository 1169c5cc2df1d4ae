"""coeft list, show and copy: what there is, found by listing the folders."""

import argparse
import ast
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from coeft.errors import UserError, near

from .arguments import Parser

CONF = Path(str(files("coeft.conf")))
RECIPES = Path(str(files("coeft.recipes")))
METHODS = Path(str(files("coeft"))) / "methods"


def recipe_names() -> list[str]:
    """The recipes that coeft ships, such as vtab/cifar100."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def options(group: str, folder: Path = CONF) -> list[str]:
    """The options of a config group, such as vit_base of backbone."""
    root = folder / group
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        UserError: there is no such recipe.
    """
    if name not in recipe_names():
        raise UserError(f"no recipe {name!r}; {near(name, recipe_names())}")
    return RECIPES / f"{name}.yaml"


def list_main(argv: list[str]) -> int:
    """coeft list WHAT [FILTER]"""
    parser = Parser("list", "List what there is. FILTER is a part of the name; for runs, the folder to look in.")
    parser.add_argument("what", choices=sorted(_LISTS), metavar="WHAT", help=", ".join(_LISTS))
    parser.add_argument("filter", nargs="?", default="", metavar="FILTER")
    arguments = parser.parse_args(argv)
    rows = list(_LISTS[arguments.what](arguments.filter))
    if not rows:
        raise UserError(f"no {arguments.what} match {arguments.filter!r}" if arguments.filter else _nothing(arguments))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if arguments.what == "backbones":
        print("any timm model: backbone=timm backbone.name=NAME", file=sys.stderr)
        print("any model of transformers: backbone=hf backbone.name=OWNER/NAME or a folder", file=sys.stderr)
    return 0


def _nothing(arguments: argparse.Namespace) -> str:
    return "no runs in runs/; give the folder to look in" if arguments.what == "runs" else f"no {arguments.what}"


def _recipes(part: str) -> Iterator[tuple[str, ...]]:
    for name in recipe_names():
        if part in name:
            yield name, first_comment(RECIPES / f"{name}.yaml")


def _group(group: str) -> Callable[[str], Iterator[tuple[str, ...]]]:
    def rows(part: str) -> Iterator[tuple[str, ...]]:
        for name in options(group):
            if part in name:
                yield name, _about(group, name)

    return rows


def _about(group: str, option: str) -> str:
    """One line on an option: its own first comment, or what its kind's file begins with."""
    from coeft.config import FOLDERS, read_yaml

    path = CONF / group / f"{option}.yaml"
    if comment := first_comment(path):
        return comment
    settings = read_yaml(path)
    source = Path(str(files("coeft"))) / FOLDERS[group] / f"{settings.get('kind')}.py"
    about = docstring(source).partition("\n")[0] if source.is_file() else ""
    name = settings.get("name")
    return str(name) if name not in (None, "???") else about


def _runs(folder: str) -> Iterator[tuple[str, ...]]:
    import json

    root = Path(folder or "runs").expanduser()
    if folder and not root.is_dir():
        raise UserError(f"no folder {root}")
    for config in sorted(_configs(root)):
        run = config.parent
        status, metric, value = "incomplete", "", ""
        try:
            results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError):
            status = "results.json unreadable"
        else:
            status, metric = str(results.get("status", "?")), str(results.get("metric") or "")
            value = _measured(results)
        yield str(run), status, metric, value


def _configs(root: Path) -> Iterator[Path]:
    """config.yaml of every run below a folder, without looking inside the parts of a run."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "fold_")))
        if "config.yaml" in names:
            below[:] = [name for name in below if name not in ("checkpoints", "adapter", "plots", "export", "wandb")]
            yield Path(folder) / "config.yaml"


def _measured(results: dict[str, Any]) -> str:
    value, std = results.get("value"), results.get("std")
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" + (f" ± {std:.4f}" if isinstance(std, int | float) else "")


_LISTS: dict[str, Callable[[str], Iterator[tuple[str, ...]]]] = {
    "recipes": _recipes,
    "backbones": _group("backbone"),
    "methods": _group("peft"),
    "datasets": _group("data"),
    "runs": _runs,
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
    if (METHODS / f"{name}.py").is_file():
        print(docstring(METHODS / f"{name}.py") + "\n")
    lines = (CONF / "peft" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if not line.startswith(("# @package", "kind:", "{}"))]
    if any(not line.startswith("#") for line in settings):
        print(f"Settings, as peft.{name}.KEY=VALUE, with their defaults:")
    print("\n".join(line.removeprefix("# ") if line.startswith("#") else f"    {line}" for line in settings))
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

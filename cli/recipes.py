"""A recipe's file, read and made an option of Hydra's group `recipe`.

A recipe is merged at the root of the config. Hydra reads it from the ConfigStore, not from its file, because what it
says depends on what is typed: settings for a group whose option is replaced on the command line do not apply.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from coeft.config import FOLDERS, read_yaml
from coeft.errors import UserError, near

from .catalogue import CONF, RECIPES, options, recipe_file

GROUPS = (*FOLDERS, "trainer")
Pick = str | list[str] | None


@cache
def root_picks() -> Mapping[str, Pick]:
    """The options that conf/train.yaml picks: group -> name or list of names."""
    return _picks(read_yaml(CONF / "train.yaml")["defaults"])


def _picks(defaults: list[Any]) -> dict[str, Pick]:
    picks: dict[str, Pick] = {}
    for entry in defaults:
        if isinstance(entry, dict):
            for key, value in entry.items():
                picks[re.sub(r"^(override\s+)?/?", "", str(key))] = value
    return picks


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One YAML file, and the recipe that it extends."""

    option: str
    """Its name in Hydra's group `recipe`."""
    name: str
    """What the config calls it."""
    path: Path
    shown: str
    """The file as messages name it."""
    body: dict[str, Any] = field(default_factory=dict)
    defaults: list[Any] = field(default_factory=list)
    picks: dict[str, Pick] = field(default_factory=dict)
    """The options it picks by `override`."""
    base: "Recipe | None" = None

    def chain(self) -> list["Recipe"]:
        """This recipe, the one it extends, and so on."""
        return [self, *(self.base.chain() if self.base else [])]

    def all_picks(self) -> dict[str, Pick]:
        """group -> option, of this recipe and those below it."""
        return {**(self.base.all_picks() if self.base else {}), **self.picks}

    def register(self, typed: dict[str, Pick]) -> None:
        """Make this recipe and those below it options of Hydra's, without the settings that do not apply.

        Args:
            typed: group -> option on the command line.
        """
        final = {**root_picks(), **self.all_picks(), **typed}
        own = {**root_picks(), **self.all_picks()}
        for recipe in self.chain():
            meant = {**root_picks(), **recipe.all_picks()}
            body = {
                key: value
                for key, value in recipe.body.items()
                if key not in FOLDERS or key == "peft" or _same(meant[key], own[key]) and _same(own[key], final[key])
            }
            if "peft" in typed and isinstance(body.get("peft"), dict):
                # a run's own config says `kind` for each method; the typed stack decides now
                body["peft"] = {name: _without_kind(settings) for name, settings in body["peft"].items()}
            name = {} if recipe.is_complete and "recipe" in recipe.body else {"recipe": recipe.name}
            *folder, leaf = recipe.option.split("/")
            ConfigStore.instance().store(
                group="/".join(["recipe", *folder]),
                name=leaf,
                node={"defaults": recipe.defaults, **body, **name},
                package="_global_",
            )

    @property
    def is_complete(self) -> bool:
        """Whether this is the resolved config of a run: it has all settings and picks nothing."""
        return all(
            isinstance(self.body.get(group), dict) and ("kind" in self.body[group] or "_target_" in self.body[group])
            for group in FOLDERS
            if group != "peft"
        )

    def locate(self, key: str) -> str:
        """Where the recipe, or one below it, sets a key, as a prefix of a message; empty if nowhere."""
        for recipe in self.chain():
            node: Any = recipe.body
            for part in key.split("."):
                node = node.get(part, _NOTHING) if isinstance(node, dict) else _NOTHING
            if node is not _NOTHING:
                line = line_of(recipe.path, key)
                return f"{recipe.shown}{f', line {line}' if line else ''}: "
        return ""


_NOTHING = object()


def _same(one: Pick, other: Pick) -> bool:
    return ([one] if isinstance(one, str) else one) == ([other] if isinstance(other, str) else other)


def _without_kind(settings: Any) -> Any:
    return {key: value for key, value in settings.items() if key != "kind"} if isinstance(settings, dict) else settings


def read_recipe(typed: str, *, folders: tuple[Path, ...] = (), inside: tuple[Path, ...] = ()) -> Recipe:
    """The recipe of a shipped name, or of a file that ends with .yaml.

    Args:
        folders: folders besides conf/ that hold options, from --config-dir.
        inside: the files that extend this one.
    Raises:
        UserError: no such recipe, or a file that is not one: everything that is wrong with it.
    """
    is_file = typed.endswith((".yaml", ".yml"))
    if is_file:
        path = Path(typed).expanduser()
        if inside and not path.is_absolute():
            path = inside[-1].parent / path
        if not path.is_file():
            raise UserError(f"recipe: no file {typed}" + (f" beside {inside[-1]}" if inside else ""))
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
        option, shown, name = f"user/{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest}", str(path), path.stem
    else:
        path = recipe_file(typed)
        option = name = typed
        shown = f"recipes/{path.relative_to(RECIPES).as_posix()}"
    if path.resolve() in [other.resolve() for other in inside]:
        raise UserError(f"{shown} extends itself: {' -> '.join(str(other) for other in (*inside, path))}")
    tree = read_yaml(path)
    entries = tree.pop("defaults", None) or []
    wrong: list[str] = []
    if not isinstance(entries, list):
        wrong.append(f"{shown}: defaults must be a list")
        entries = []
    reader = _Defaults(shown, path, folders, (*inside, path), wrong)
    for entry in entries:
        reader.read(entry)
    recipe = Recipe(option=option, name=name, path=path, shown=shown, body=tree)
    if recipe.is_complete:
        if not entries:  # nothing of any option's own settings may remain below
            for group in FOLDERS:
                value = "none" if group == "peft" else None
                reader.defaults.append({f"override /{group}": value})
                reader.picks[group] = value
    else:
        wrong += _misplaced(tree, shown, path)
    if wrong:
        raise UserError("\n".join(wrong))
    return Recipe(
        option=option, name=name, path=path, shown=shown, body=tree, defaults=reader.defaults, picks=reader.picks,
        base=reader.base,
    )  # fmt: skip


def _misplaced(tree: dict[str, Any], shown: str, path: Path) -> list[str]:
    """What only the defaults list, or only the command line, may say."""
    wrong = []
    nodes = {group: tree.get(group) for group in FOLDERS if group != "peft"}
    if "peft" in tree and not isinstance(tree["peft"], dict):
        line = line_of(path, "peft")
        wrong.append(
            f"{shown}, line {line}: peft: pick the stack in the defaults list: - override /peft: "
            f"{_typed(tree['peft'])}; here stand the settings of its methods"
        )
    if isinstance(tree.get("peft"), dict):
        nodes |= {f"peft.{name}": node for name, node in tree["peft"].items()}
    for key, node in nodes.items():
        if isinstance(node, dict) and "kind" in node and "_target_" not in node:
            group, _, name = key.partition(".")
            pick = f"override /{group}: {f'[{name}]' if name else node['kind']}"
            line = line_of(path, f"{key}.kind")
            wrong.append(f"{shown}, line {line}: {key}.kind: pick an option in the defaults list instead: - {pick}")
    for key in ("suite", "suite_groups"):
        if key in tree and not isinstance(tree[key], dict):
            wrong.append(f"{shown}, line {line_of(path, key)}: {key} must be a mapping of names, not {tree[key]!r}")
    if "allow_custom_targets" in tree:
        wrong.append(
            f"{shown}: allow_custom_targets can only be typed on the command line: "
            "a file that could set it could run any code"
        )
    if "hydra" in tree:
        wrong.append(f"{shown}: a recipe cannot set Hydra's own settings")
    return wrong


class _Defaults:
    """The defaults list of a recipe, in Hydra's words, and what it picks."""

    def __init__(
        self, shown: str, path: Path, folders: tuple[Path, ...], inside: tuple[Path, ...], wrong: list[str]
    ) -> None:
        self.shown, self.path, self.folders, self.inside, self.wrong = shown, path, folders, inside, wrong
        self.defaults: list[Any] = []
        self.picks: dict[str, Pick] = {}
        self.base: Recipe | None = None

    def read(self, entry: Any) -> None:
        if entry == "_self_":
            self.defaults.append(entry)
        elif isinstance(entry, str):
            self._extend(entry)
        elif isinstance(entry, dict) and len(entry) == 1:
            key, value = next(iter(entry.items()))
            words = str(key).split()
            group = words[-1].lstrip("/")
            if group == "recipe" and isinstance(value, str):
                self._extend(value)
            elif words[:-1] != ["override"] and group in GROUPS:
                self.wrong.append(f"{self.shown}: defaults: write - override /{group}: {_typed(value)}")
            elif group not in GROUPS:
                self.wrong.append(f"{self.shown}: defaults: no group {group!r}; {near(group, GROUPS)}")
            else:
                self._pick(group, value)
        else:
            self.wrong.append(
                f"{self.shown}: defaults: {entry!r} is neither - override /GROUP: OPTION nor the name of a recipe"
            )

    def _pick(self, group: str, value: Any) -> None:
        wrong = wrong_pick(group, value, self.folders)
        self.wrong += [f"{self.shown}: defaults: {line}" for line in wrong]
        self.defaults.append({f"override /{group}": value})
        self.picks[group] = value

    def _extend(self, name: str) -> None:
        name = re.sub(r"^/?recipe/|^/", "", name) if not name.endswith((".yaml", ".yml")) else name
        if self.base is not None:
            self.wrong.append(f"{self.shown}: defaults: a recipe can extend one other, not also {name}")
            return
        if self.picks:
            self.wrong.append(f"{self.shown}: defaults: {name}, which it extends, must stand before what it overrides")
            return
        try:
            self.base = read_recipe(name, folders=self.folders, inside=self.inside)
        except UserError as error:
            self.wrong += [
                line if line.startswith("recipes/") or ".yaml" in line.partition(":")[0] else f"{self.shown}: {line}"
                for line in str(error).splitlines()
            ]
        else:
            self.defaults.append(f"/recipe/{self.base.option}")


def wrong_pick(group: str, value: Any, folders: tuple[Path, ...] = ()) -> list[str]:
    """What is wrong with picking an option, or a list of them for peft."""
    names = sorted({name for folder in (CONF, *folders) for name in options(group, folder)})
    if isinstance(value, list) and group == "peft":
        twice = sorted({str(name) for name in value if value.count(name) > 1})
        wrong = [f"peft: {name} stands in the stack twice" for name in twice]
        if "none" in value and len(value) > 1:
            wrong.append("peft: none is the empty stack; it cannot stand in a list with methods")
        return wrong + [line for name in value for line in _wrong_name(group, name, names)]
    return _wrong_name(group, value, names)


def _wrong_name(group: str, value: Any, names: list[str]) -> list[str]:
    if isinstance(value, str) and value in names:
        return []
    if isinstance(value, list):
        return [f"{group} takes one option, not the list {_typed(value)}"]
    if isinstance(value, dict):
        return [f"{group}: pick an option by its name, then set its keys one by one: {group}.KEY=VALUE"]
    return [f"{group}: no option {_typed(value)!r}; {near(_typed(value), names)}"]


def _typed(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def line_of(path: Path, key: str) -> int | None:
    """The line on which a YAML file sets a key, such as optim.lr; None if it does not."""
    with path.open(encoding="utf-8") as file:
        node = yaml.compose(file)
    line = None
    for part in key.split("."):
        if not isinstance(node, yaml.MappingNode):
            return None
        for name, value in node.value:
            if name.value == part:
                line, node = name.start_mark.line + 1, value
                break
        else:
            return None
    return line

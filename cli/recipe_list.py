"""The catalogue of recipes: what each file's header says, and what it picks. Nothing is composed, so it is quick."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coeft.config import read_yaml
from coeft.errors import UserError

from .catalogue import CONF, recipe_file, recipe_names
from .recipes import Pick, Recipe, read_recipe, root_picks

LABELS = ("Command", "Data", "Expected", "Measured", "Paper")
HEAD = ("recipe", "task", "backbone", "stack", "data", "network")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The comment that a recipe's file begins with."""

    about: str
    """What it is, in a line."""
    fields: dict[str, str] = field(default_factory=dict)
    """Label -> text, lines joined: Command, Data, Expected, Measured, Paper."""
    notes: str = ""
    """What else it says."""

    @property
    def command(self) -> list[str]:
        """The words of the command."""
        return shlex.split(self.fields["Command"].splitlines()[0])

    @property
    def size(self) -> str:
        """How much data there is."""
        return self.fields["Data"].partition(";")[0]

    @property
    def is_measured(self) -> bool:
        """Whether numbers in it were measured by us."""
        return re.match(r"\d{4}-\d\d-\d\d", self.fields["Measured"]) is not None


def read_header(path: Path) -> Header:
    """The header of a recipe's file.

    Raises:
        UserError: it lacks a label, says one twice, or has a label without a text.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").rstrip())
    found: dict[str, str] = {}
    notes: list[str] = []
    label: str | None = None
    for line in lines[1:]:
        match = re.fullmatch(rf" ({'|'.join(LABELS)}):(?: +(.*))?", line)
        if match:
            label = match[1]
            if label in found:
                raise UserError(f"{path}: the header says {label}: twice")
            found[label] = match[2] or ""
        elif label is not None and line.startswith("   "):
            found[label] += f"\n{line.strip()}"
        else:
            label = None
            notes.append(line.strip())
    wrong = [f"{name}:" for name in LABELS if not found.get(name)]
    if wrong or not lines:
        raise UserError(f"{path}: the header must begin with what the recipe is, and lacks {', '.join(wrong)}")
    texts = {name: text if name == "Command" else " ".join(text.split()) for name, text in found.items()}
    return Header(about=lines[0].strip(), fields=texts, notes="\n".join(notes).strip())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe in the catalogue."""

    name: str
    task: str
    backbone: str
    stack: str
    """Methods; of a suite also the number of its runs."""
    network: str
    """What is fetched from the network when it is not in the cache: weights, data, both, or "no"."""
    header: Header

    @property
    def row(self) -> tuple[str, ...]:
        """The cells under HEAD."""
        return self.name, self.task, self.backbone, self.stack, self.header.size, self.network


def entries(part: str = "") -> Iterator[Entry]:
    """The recipes whose name holds `part`."""
    for name in recipe_names():
        if part in name:
            yield entry(name)


def entry(name: str) -> Entry:
    """A shipped recipe.

    Raises:
        UserError: there is no such recipe, or its file is not one.
    """
    recipe = read_recipe(name)
    header = read_header(recipe_file(name))
    picks = {**root_picks(), **recipe.all_picks()}
    return Entry(
        name=name,
        task=str(picks["task"]),
        backbone=str(picks["backbone"]),
        stack=_stack(recipe, picks["peft"]),
        network=_network(recipe, picks, header),
        header=header,
    )


def _stack(recipe: Recipe, pick: Pick) -> str:
    suite, seeds = _set(recipe, "suite") or {}, _set(recipe, "seeds") or []
    methods = [pick] if isinstance(pick, str) else list(pick or ["none"])
    own = any(str(text).startswith("peft=") for overrides in suite.values() for text in overrides)
    text = "several" if own else "+".join(methods)
    text += f", {len(suite)} runs" if suite else ""
    return text + (f" x {len(seeds)} seeds" if seeds else "")


def _network(recipe: Recipe, picks: Mapping[str, Pick], header: Header) -> str:
    backbone, data = (_settings(recipe, group, picks[group]) for group in ("backbone", "data"))
    for text in header.command[3:]:  # after coeft train recipe=NAME
        key, _, value = text.partition("=")
        if key.startswith("data."):
            data[key.removeprefix("data.")] = value
    needed = []
    if backbone.get("pretrained", True) and not backbone.get("weights") and not _is_local(backbone.get("name")):
        needed.append("weights")
    name = data.get("hub_name") if data.get("root") is None else None
    if not _is_local(data.get("name") if data["kind"] == "hub" else name):
        needed.append("data")
    return ", ".join(needed) or "no"


def _is_local(name: Any) -> bool:
    """Whether a name is no name on the hub: none at all, or a path."""
    return name is None or str(name).startswith((".", "/", "~"))


def _set(recipe: Recipe, key: str) -> Any:
    """What a recipe, or the nearest one below it, says for a key; None if none says anything."""
    return next((each.body[key] for each in recipe.chain() if key in each.body), None)


def _settings(recipe: Recipe, group: str, option: Pick) -> dict[str, Any]:
    """The settings of a group: its option's, and over them what those recipes say that mean this option."""
    settings = dict(read_yaml(CONF / group / f"{option}.yaml"))
    for each in reversed(recipe.chain()):
        if {**root_picks(), **each.all_picks()}[group] == option:
            settings |= each.body.get(group, {})
    return settings

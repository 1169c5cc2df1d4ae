"""argv -> checked configs: Hydra composes, the dataclasses of coeft.config check. Nothing here imports torch.

Hydra's compose API is used instead of @hydra.main: it writes no files, runs no callbacks that a config names, and
leaves sys.argv alone, from which Lightning starts its other processes.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coeft.config import (
    FOLDERS,
    NOTHING,
    Allowed,
    TrainConfig,
    annotations,
    first_line,
    from_dict,
    looks_secret,
    methods_by_name,
    read_yaml,
    refused_in_file,
    to_dict,
)
from coeft.errors import UserError, near

from .arguments import PERMISSIONS, permissions
from .catalogue import CONF, options
from .recipes import GROUPS, Pick, Recipe, read_recipe, wrong_pick

KEYS = tuple(spec.name for spec in fields(TrainConfig))


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One run, or one suite of runs."""

    config: TrainConfig
    members: dict[str, TrainConfig] = field(default_factory=dict)
    """The runs of a suite by name; empty is one run."""


def compose(
    overrides: Iterable[str],
    *,
    config_dir: str | None = None,
    config_name: str | None = None,
    multirun: bool = False,
) -> list[Composition]:
    """The checked configs of a command line: one, or with `multirun` one for each combination of values.

    Args:
        overrides: key=value as the shell gives it.
        config_dir: a folder with a config, such as a run directory, or with options of the user's own.
        config_name: a file in config_dir, without .yaml: the resolved config of a run, or one with a defaults list.
    Raises:
        UserError: everything that is wrong, one line each.
    """
    source = _Source.of(config_dir, config_name)
    lists = [_choices(text) if multirun else [text] for text in overrides]
    lines = [list(line) for line in itertools.product(*lists)]
    with source.initialized():
        found = [_compose_line(line, source) for line in lines]
    if len(found) > 1:
        found = [_numbered(composition, number) for number, composition in enumerate(found)]
    return found


def _numbered(composition: Composition, number: int) -> Composition:
    """A run of several under one typed run_dir gets a folder of its own in it."""
    run_dir = composition.config.run_dir
    if run_dir is None:
        return composition
    return replace(composition, config=replace(composition.config, run_dir=str(Path(run_dir) / str(number))))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What --config-dir and --config-name add."""

    folders: tuple[Path, ...] = ()
    run_config: Path | None = None
    """The resolved config of a run: composed like a recipe."""
    primary: str = "train"
    primary_folder: Path | None = None
    """Where the primary config is, if it is the user's."""
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """Name or file -> recipe, read once."""
    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    """Options -> what Hydra composed, before any value is set: the runs of a suite often differ in values alone."""

    @classmethod
    def of(cls, config_dir: str | None, config_name: str | None) -> "_Source":
        if config_dir is None:
            if config_name not in (None, "train"):
                raise UserError(f"--config-name {config_name} needs --config-dir FOLDER, the folder of the file")
            return cls()
        folder = Path(config_dir).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir: no folder {config_dir}")
        if config_name is None:
            return cls(folders=(folder,))
        name = config_name.removesuffix(".yaml")
        path = folder / f"{name}.yaml"
        if not path.is_file():
            stems = [file.stem for file in folder.glob("*.yaml")]
            raise UserError(f"--config-name: no file {path}; {near(name, stems)}")
        tree = read_yaml(path)
        if "defaults" in tree and (wrong := refused_in_file(tree, NOTHING)):
            raise UserError("\n".join(f"{path}: {text}" for text in wrong))
        if "defaults" not in tree:
            return cls(folders=(folder,), run_config=path)
        if "hydra" in tree:
            raise UserError(f"{path}: a config cannot set Hydra's own settings")
        return cls(folders=(folder,), primary=name, primary_folder=folder)

    def initialized(self) -> AbstractContextManager[None]:
        """Hydra, with the folder of the primary config as its own."""
        if self.primary_folder is not None:
            return initialize_config_dir(str(self.primary_folder), version_base="1.3", job_name="coeft")
        return initialize_config_module("coeft.conf", version_base="1.3", job_name="coeft")

    def search_path(self) -> str:
        """The override that lets Hydra find the options of the other folders."""
        others = ["pkg://coeft.conf"] if self.primary_folder else [f"file://{folder}" for folder in self.folders]
        return f"hydra.searchpath={encode(others)}"


def _compose_line(line: list[str], source: _Source) -> Composition:
    allowed = permissions(line)  # of what is typed: a suite's overrides come from a file
    base = _compose_one(line, source, allowed)
    suite, seeds = base.config.suite, base.config.seeds
    groups = base.config.suite_groups
    if groups and not suite:
        raise UserError("suite_groups: there is no suite whose runs could be in groups; set suite_groups={}")
    if not suite and not seeds:
        return Composition(config=base.config)
    bare = [text for text in line if _head(text) not in ("suite", "suite_groups", "seeds", "run_dir")]
    members: dict[str, TrainConfig] = {}
    wrong: list[str] = []
    failed: list[str] = []
    outside = dict(base.outside)
    for name, own in suite.items():
        for text in own:
            if _head(text) in ("suite", "suite_groups", "seeds"):
                wrong.append(f"suite.{name}: {text}: a suite cannot stand inside a suite")
            if _head(text) in ("recipe", "run_dir", "dry_run"):
                wrong.append(f"suite.{name}: {text}: a member shares the {_head(text)} of its suite")
            if text.lstrip("+").partition("=")[0] in PERMISSIONS:
                wrong.append(f"suite.{name}: {text}: it can only be typed on the command line")
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith((".", "fold_")) or name in _TAKEN:
            wrong.append(f"suite.{name}: {name!r} cannot be the name of a member's folder")
        if wrong:
            continue
        try:
            one = _compose_one(_typed_wins(own, bare), source, allowed, suite_of=name)
        except UserError as error:
            failed += [f"suite.{name}: {text}" for text in str(error).splitlines()]
        else:
            members[name] = one.config
            outside = {key: text for key, text in outside.items() if key in one.outside}
    wrong += _wrong_groups(groups, suite, members)
    if wrong or failed:
        raise UserError("\n".join(dict.fromkeys([*wrong, *failed])))
    if suite and outside:
        raise UserError("\n".join(f"{key} is typed, but no member of the suite has this method" for key in outside))
    config = base.config
    if suite:
        config = replace(config, suite={name: differences(config, member) for name, member in members.items()})
    if seeds:
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds: {seeds} repeats a seed")
        if any(text.partition("=")[0].lstrip("+") == "seed" for own in [line, *suite.values()] for text in own):
            raise UserError("seed is set beside seeds; seeds=[...] alone decides, or seeds=[] for one run")
        plain = replace(config, suite={}, seeds=[], run_dir=None)
        members = {
            f"{name}-seed_{seed}" if name else f"seed_{seed}": replace(member, seed=seed)
            for name, member in (members or {"": plain}).items()
            for seed in seeds
        }
    seen: dict[str, str] = {}
    for name, member in members.items():
        text = repr(member)
        if text in seen:
            raise UserError(
                f"suite: {seen[text]} and {name} come out as the same run; "
                "a typed key=value that wins over both has made them equal"
            )
        seen[text] = name
    return Composition(config=config, members=members)


def _wrong_groups(
    groups: Mapping[str, list[str]], suite: Mapping[str, list[str]], members: Mapping[str, TrainConfig]
) -> list[str]:
    """What is wrong with the groups of a suite."""
    wrong: list[str] = []
    group_of: dict[str, str] = {}
    for group, names in groups.items():
        if not names:
            wrong.append(f"suite_groups.{group}: name the runs whose mean is to be told")
        for name in names:
            if name not in suite:
                wrong.append(f"suite_groups.{group}: the suite has no run {name!r}; {near(name, suite)}")
            elif name in group_of:
                both = "twice" if group_of[name] == group else f"in {group_of[name]} too"
                wrong.append(f"suite_groups.{group}: {name} stands {both}; a run is in one group")
            group_of.setdefault(name, group)
    metrics = {str(members[name].task.metric): name for name in reversed(group_of) if name in members}
    if len(metrics) > 1:
        told = ", ".join(f"{metric} ({name})" for metric, name in metrics.items())
        wrong.append(f"suite_groups: a mean over runs takes one metric, but theirs are {told}; set task.metric")
    return wrong


# what a run directory holds besides its members
_TAKEN = "adapter checkpoints config.yaml environment.json log.txt metrics.csv plots results.json".split()


def _typed_wins(own: list[str], typed: list[str]) -> list[str]:
    """A member's overrides and the typed ones; where both pick for a group, only the typed one."""
    heads = {text.partition("=")[0] for text in typed}
    return [*(text for text in own if text.partition("=")[0] not in heads), *typed]


@dataclass(frozen=True, kw_only=True)
class _One:
    """A config, and what was typed for methods outside its stack: an error, but in a suite others may have them."""

    config: TrainConfig
    outside: dict[str, str]
    """Typed key -> what is wrong with it."""


def _compose_one(line: list[str], source: _Source, allowed: Allowed, suite_of: str | None = None) -> _One:
    """Compose and check one config; `line` has no sweeps.

    Args:
        allowed: by the user, not by a suite's overrides.
        suite_of: name of the member of a suite that this is.
    """
    typed, wrong = _read_line(line, source)
    recipe: Recipe | None = None
    try:
        if source.run_config is not None:
            if typed.recipe is not None:
                raise UserError("recipe= and --config-name both name a config; give one of them")
            recipe = read_recipe(str(source.run_config), folders=source.folders)
            if not recipe.is_complete:
                raise UserError(
                    f"{source.run_config} is neither the config of a run nor has it a defaults list; "
                    f"a recipe is given as recipe={source.run_config}"
                )
        elif typed.recipe is not None:
            if typed.recipe not in source.recipes:
                source.recipes[typed.recipe] = read_recipe(typed.recipe, folders=source.folders)
            recipe = source.recipes[typed.recipe]
    except UserError as error:  # without the recipe nothing else can be checked
        raise UserError("\n".join(dict.fromkeys([*wrong, *str(error).splitlines()]))) from error
    arguments = [text for key, text in typed.arguments if key.split(".")[0] not in typed.broken]
    if recipe is not None:
        arguments.insert(0, f"recipe={recipe.option}")
    if source.folders and not any(text.startswith("hydra.searchpath=") for text in arguments):
        arguments.append(source.search_path())
    try:
        if tuple(arguments) not in source.composed:
            if recipe is not None:
                recipe.register(typed.picks)
            source.composed[tuple(arguments)] = hydra_compose(source.primary, overrides=arguments)
        composed = copy.deepcopy(source.composed[tuple(arguments)])
        if refused := _refused(composed, recipe):
            raise UserError("\n".join([*wrong, *refused]))
        wrong += _set(composed, [pair for pair in typed.values if pair[0].split(".")[0] not in typed.broken])
        tree = OmegaConf.to_container(composed, resolve=True)
    except HydraException as error:
        raise UserError("\n".join([*wrong, _explain(error, recipe)])) from error
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        where = recipe.locate(key) if recipe else ""
        raise UserError("\n".join([*wrong, where + first_line(error)])) from error
    assert isinstance(tree, dict)
    plain = {str(key): value for key, value in tree.items()}
    is_suite = suite_of is not None or bool(plain.get("suite"))
    if suite_of is not None:
        plain |= {"suite": {}, "suite_groups": {}, "seeds": [], "run_dir": None}

    def locate(key: str) -> str:
        if any(key == other or other.startswith(f"{key}.") for other in typed.keys):
            return ""
        return recipe.locate(key) if recipe else ""

    outside = {} if "peft" in typed.broken else _outside(typed.keys, plain.get("peft"))
    config = from_dict(
        plain,
        allowed=allowed,
        locate=locate,
        mistakes=wrong if is_suite else [*wrong, *outside.values()],
    )
    return _One(config=config, outside=outside)


def _refused(composed: DictConfig, recipe: Recipe | None) -> list[str]:
    """What the files of a config may not say, before anything typed is in it."""
    tree = OmegaConf.to_container(composed)
    assert isinstance(tree, dict)
    return [
        (recipe.locate(text.partition(":")[0]) if recipe else "") + text
        for text in refused_in_file({str(key): value for key, value in tree.items()}, NOTHING)
    ]


def _set(config: DictConfig, values: list[tuple[str, Any]]) -> list[str]:
    """Put typed values into a composed config, keys that it does not have too; returns what is wrong.

    Not through Hydra's overrides, whose grammar cannot say everything, such as a mapping with any keys. A key that
    does not exist is refused by from_dict, with the nearest name.
    """
    wrong = []
    OmegaConf.set_struct(config, False)
    for key, value in values:
        try:
            # suite={...} replaces the recipe's, other mappings change the keys that they name
            OmegaConf.update(config, key, value, merge=key not in ("suite", "suite_groups"), force_add=True)
        except OmegaConfBaseException:
            wrong.append(f"{key}: {key.rpartition('.')[0]} has no keys of its own")
    return wrong


def _outside(keys: Iterable[str], peft: Any) -> dict[str, str]:
    """Typed settings of methods that are not in the stack: key -> what is wrong."""
    nodes = peft if isinstance(peft, dict) else {}
    stack = [name for name, node in nodes.items() if isinstance(node, dict) and ("kind" in node or "_target_" in node)]
    wrong = {}
    for key in keys:
        parts = key.split(".")
        if len(parts) > 2 and parts[0] == "peft" and parts[1] not in stack and parts[1] in methods_by_name():
            hint = f"peft=[{','.join([*stack, parts[1]])}]"
            wrong[key] = f"{key} is typed, but the stack is [{','.join(stack)}]; add the method by {hint}"
    return wrong


@dataclass(kw_only=True)
class _Typed:
    """A command line, read."""

    arguments: list[tuple[str, str]] = field(default_factory=list)
    """Group, and group=option in Hydra's grammar, without the recipe."""
    values: list[tuple[str, Any]] = field(default_factory=list)
    """Dotted key and value."""
    keys: list[str] = field(default_factory=list)
    """Dotted keys that were set."""
    picks: dict[str, Pick] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Groups whose pick is wrong: their settings cannot be checked."""
    recipe: str | None = None


def _read_line(line: list[str], source: _Source) -> tuple[_Typed, list[str]]:
    """The overrides in Hydra's grammar, and what is wrong with them."""
    typed, wrong = _Typed(), []
    for text in line:
        try:
            _read(text, typed, source)
        except UserError as error:
            wrong += str(error).splitlines()
    return typed, wrong


def _read(text: str, typed: _Typed, source: _Source) -> None:
    key, equals, value = text.partition("=")
    if text.startswith("~") and not text.startswith("~/"):
        if _head(text) not in KEYS:
            raise UserError(f"{text}: no key {_head(text)!r}; {near(_head(text), KEYS)}")
        if equals and not isinstance(_plain(_parsed(f"x={value}")), str):
            raise UserError(f"{text}: what is to be left out is named by {key} alone")
        typed.arguments.append((key[1:], text))
        return
    key = key.lstrip("+")
    head = _head(text)
    if not equals:
        raise UserError(f"{text!r} is not key=value" + (f"; did you mean recipe={text}?" if "/" not in key else ""))
    if head == "hydra":
        if key != "hydra.searchpath":
            raise UserError(f"{text}: coeft writes its own run directory and log; set run_dir=PATH")
        typed.arguments.append((key, text))
        return
    if head not in KEYS:
        raise UserError(f"{text}: no key {head!r}; {near(head, KEYS)}")
    if key == "recipe":
        if typed.recipe is not None:
            raise UserError("recipe= is given twice")
        if value in ("", "null"):
            return
        if "," in value and not value.endswith((".yaml", ".yml")):
            raise UserError(f"{text}: one recipe for one run; several need -m")
        typed.recipe = value.strip("'\"")
        return
    if key in GROUPS:
        pick = _value(text, key, value)
        if key in typed.picks or key in typed.broken:
            raise UserError(f"{key}= is given twice")
        typed.broken.add(key)
        if isinstance(pick, str) and "," in pick:
            stack = f"a stack is peft=[{pick}]; " if key == "peft" else ""
            raise UserError(f"{text}: {stack}several runs need -m")
        if wrong := wrong_pick(key, pick, source.folders):
            raise UserError("\n".join(wrong))
        typed.broken.remove(key)
        typed.picks[key] = pick
        typed.arguments.append((key, f"{key}={encode(pick)}"))
        return
    parts = key.split(".")
    if parts[-1] == "kind" and len(parts) > 1 and parts[0] in FOLDERS:
        group = parts[0]
        how = "the stack by peft=[...]" if group == "peft" else f"an option by {group}={value}"
        raise UserError(f"{text}: choose {how}")
    parsed = _value(text, key, value)
    for name in re.findall(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)", value):
        if looks_secret(name):
            raise UserError(
                f"{key}: the environment variable {name} looks like a secret, which must not reach a config"
            )
    typed.keys.append(key)
    typed.values.append((key, parsed))


def _head(text: str) -> str:
    return re.split(r"[.@=]", text.lstrip("+~"))[0]


def read_value(text: str) -> Any:
    """The value of a typed key=value.

    Raises:
        UserError: a list or mapping that cannot be read.
    """
    key, _, value = text.partition("=")
    return _value(text, key.lstrip("+"), value)


def _value(text: str, key: str, value: str) -> Any:
    """The value of one key=value. Text for a key that takes text is what was typed, to the letter."""
    if takes_text(key) and not _interpolates(value) and value.lower() != "null":
        quoted = _parsed(f"x={value}")
        if isinstance(quoted, QuotedString):
            return quoted.text
        return value
    parsed = _parsed(f"x={value}")
    if isinstance(parsed, Override):
        return value  # several values: not a sweep without -m, so one text, which the schema may refuse
    if parsed is not _UNREADABLE:
        return _plain(parsed)
    if value[:1] in ("[", "{"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{text}: cannot read the list or mapping; put text inside it in quotes") from None
    return value


_UNREADABLE = object()


def _parsed(text: str) -> Any:
    """The value that Hydra's grammar reads; the Override itself for a sweep; _UNREADABLE if it cannot."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return _UNREADABLE
    return override if override.is_sweep_override() else override._value


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _interpolates(value: str) -> bool:
    return "${" in value


def takes_text(key: str) -> bool:
    """Whether a dotted key takes text, such as a path, whatever option is chosen."""
    found = annotations(key)
    return bool(found) and all(hint is str or set(get_args(hint)) == {str, type(None)} for hint in found)


def _choices(text: str) -> list[str]:
    """The values that one argument of a multirun stands for, each as key=value."""
    key, equals, value = text.partition("=")
    if (key == "recipe" or takes_text(key.lstrip("+"))) and Path(value).expanduser().exists():
        return [text]  # a path with a comma in it
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [f"{key}={part}" for part in value.split(",")] if equals and value[:1] not in ("[", "{") else [text]
    if not override.is_sweep_override():
        return [text]
    return [f"{key}={part}" for part in override.sweep_string_iterator()]


def encode(value: Any) -> str:
    """A value as one would type it: read_value gives it back. Without mappings it is in Hydra's grammar too."""
    if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value)):
        return json.dumps(value, ensure_ascii=False)  # Hydra's grammar has no quoted keys; _value reads this as YAML
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(encode, value))}]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    return "'" + re.sub(r"\\+$", lambda match: match[0] * 2, escaped) + "'"


def differences(base: TrainConfig, member: TrainConfig) -> list[str]:
    """Overrides that turn one checked config into another: a suite's config repeats its members by them."""
    before, after = to_dict(base), to_dict(member)
    lines: list[str] = []
    for group in FOLDERS:
        one, other = before.pop(group), after.pop(group)
        if group == "peft":
            if list(one) != list(other):
                lines.append(f"peft={encode(list(other)) if other else 'none'}")
            for name, settings in other.items():
                known = one.get(name) or _defaults("peft", name)
                lines += _changed(f"peft.{name}", known, settings)
        elif one.get("kind") == other.get("kind"):
            lines += _changed(group, one, other)
        else:
            lines.append(f"{group}={other['kind']}")
            lines += _changed(group, _defaults(group, other["kind"]), other)
    for key in ("seed", "init_from", "cv", "trainer"):
        lines += _changed(key, before[key], after[key])
    return lines


def _defaults(group: str, option: str) -> dict[str, Any]:
    return {key: value for key, value in read_yaml(CONF / group / f"{option}.yaml").items() if key != "defaults"}


def _changed(where: str, before: Any, after: Any) -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping) and after and set(before) <= set(after):
        for key in after:
            if key not in before or before[key] != after[key]:
                yield from _changed(f"{where}.{key}", before.get(key), after[key])
        return
    yield f"{where}={encode(after)}"


def _explain(error: HydraException, recipe: Recipe | None) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        key = str(getattr(cause, "full_key", "") or "")
        where = recipe.locate(key) if recipe else ""
        if key and "merge" in str(cause):
            return f"{where}{key} must be a mapping of keys to values"
        return where + first_line(cause)
    text = str(error).split("\n\nConfig search path")[0]
    missing = re.search(r"[Cc]ould not find '([^']+)/([^'/]+)'", text)
    if missing:
        return f"{missing[1]}: no option {missing[2]!r}; {near(missing[2], options(missing[1]))}"
    return text.splitlines()[0]

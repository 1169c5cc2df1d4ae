"""The schema of a run. Imports neither torch nor Hydra, so that a wrong key is an error in a third of a second.

Each group's options are dataclasses beside what they configure (`coeft/methods/lora.py` holds `LoRA`), found by
their `kind`: the name of the file. The command line fills them from YAML and overrides; Python users build them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, Container, DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from coeft.errors import UserError, near

# group of the config -> the folder whose files are its kinds
FOLDERS = {
    "backbone": "backbones",
    "peft": "methods",
    "data": "data",
    "task": "tasks",
    "optim": "optim",
    "logger": "loggers",
}


STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
MOST_THREADS = 1024  # beyond any machine's


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What runs code of somebody else. The user allows it by typing it; no file can."""

    custom_targets: bool = False
    """Classes that a config names by `_target_`: allow_custom_targets=true."""
    remote_code: bool = False
    """Python code that comes with a model: backbone.trust_remote_code=true."""


NOTHING = Allowed()


@dataclass(frozen=True, kw_only=True)
class CV:
    """How the training data is divided."""

    folds: int = 0
    """Number of folds; 0 or 1 is standard training."""
    stratified: bool = True
    """Keep the class proportions in every fold and in the inner validation part."""
    group: str | None = None
    """Column whose equal values must not be divided between training and held-out data."""
    val_fraction: float = 0.1
    """Fraction of the training part that picks the epoch, when the data has no validation split of its own."""
    refit: bool = False
    """After the folds, also train once on all data into adapter/."""

    def __post_init__(self) -> None:
        if self.folds < 0:
            raise UserError(f"cv.folds must be 0 or more, not {self.folds}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"cv.val_fraction must be in [0, 1), not {self.val_fraction}")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long and on what the training runs."""

    max_epochs: int = 10
    patience: int | None = None
    """Stop after so many epochs without a better validation metric; null never stops early."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient over all trained parameters; null does not clip."""
    on_nan: str = "stop"
    """stop, or skip: what a step does whose loss or gradient is not finite. A step that is skipped changes nothing."""
    micro_batch_size: int | None = None
    """Samples per device and forward; null is the whole batch. Accumulation follows from data.batch_size."""
    precision: str = "auto"
    """auto, fp32 or bf16. auto is bf16 for models of 2 M weights and more in linear layers where the hardware
    multiplies it, else fp32. Under bf16 frozen weights are stored in it; what is trained, head and loss stay fp32."""
    compile: bool = False
    """Let torch.compile make code for the blocks of the model; needs a C++ compiler."""
    cache_frozen: Any = "auto"
    """auto, true or false: compute what the frozen layers below the first trained one give once for every image. auto
    does where that is exact and fits into a quarter of the free memory."""
    devices: Any = 1
    """Number of devices, a list of GPUs such as [0,2], or auto: all GPUs. Without a GPU, a number of processes."""
    strategy: str = "auto"
    """How several devices share the work: ddp, auto is the same; fsdp divides the frozen weights, see
    docs/several-devices.md."""
    threads: int | None = None
    """CPU threads of torch; null leaves torch's choice. Other numbers of threads give other low bits."""
    progress: bool = True
    """Show progress bars when standard error is a terminal."""

    def __post_init__(self) -> None:
        if self.max_epochs < 1:
            raise UserError(f"trainer.max_epochs must be 1 or more, not {self.max_epochs}")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"trainer.patience must be 1 or more epochs, or null, not {self.patience}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"trainer.clip_norm must be positive, or null, not {self.clip_norm}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"trainer.micro_batch_size must be 1 or more, or null, not {self.micro_batch_size}")
        if self.on_nan not in ("stop", "skip"):
            raise UserError(f"trainer.on_nan must be stop or skip, not {self.on_nan!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"trainer.precision must be auto, fp32 or bf16, not {self.precision!r}")
        if self.compile and self.strategy == "fsdp":
            raise UserError("trainer.compile=true does not go together with trainer.strategy=fsdp; take one of them")
        if self.cache_frozen not in ("auto", True, False):
            raise UserError(f"trainer.cache_frozen must be auto, true or false, not {self.cache_frozen!r}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"trainer.threads must be 1 to {MOST_THREADS}, or null, not {self.threads}")
        if not _are_devices(self.devices):
            raise UserError(
                f"trainer.devices must be 1 or more, a list of GPUs such as [0,2], or auto, not {self.devices!r}"
            )
        if self.strategy not in STRATEGIES:
            why = " It divides what is trained, of which coeft could not write an adapter; fsdp divides the rest."
            why = why if _divides(self.strategy) else ""
            raise UserError(f"trainer.strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}.{why}")


def _are_devices(devices: Any) -> bool:
    if isinstance(devices, list):
        whole = all(isinstance(device, int) and not isinstance(device, bool) and device >= 0 for device in devices)
        return bool(devices) and whole and len(set(devices)) == len(devices)
    return devices == "auto" or (isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1)


def _divides(strategy: str) -> bool:
    """Whether a strategy of Lightning's leaves every process a part of the weights."""
    return strategy.startswith(("fsdp", "deepspeed", "model_parallel"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run."""

    recipe: str | None = None
    """Name of the recipe, or null."""
    suite: dict[str, list[str]] = field(default_factory=dict)
    """Runs of a suite: name -> overrides. Empty is one run."""
    suite_groups: dict[str, list[str]] = field(default_factory=dict)
    """Groups of a suite's runs whose means are told, and the mean of these means: group -> names of runs."""
    seeds: list[int] = field(default_factory=list)
    """Repeat every run with each of these seeds. Empty is `seed` alone."""
    seed: int = 0
    run_dir: str | None = None
    """Folder of the run; null is runs/RECIPE/TIME."""
    dry_run: bool = False
    allow_custom_targets: bool = False
    """Whether classes may be named by `_target_`; typed only, and never written to a file."""
    init_from: str | None = None
    """A run or an adapter to start from."""
    cv: CV = field(default_factory=CV)
    backbone: Any = MISSING
    data: Any = MISSING
    task: Any = MISSING
    peft: dict[str, Any] = field(default_factory=dict)
    """The stack: method name -> its settings, in the order of application. Empty is peft=none, the head alone."""
    optim: Any = MISSING
    trainer: Trainer = field(default_factory=Trainer)
    logger: Any = MISSING


def kinds(group: str) -> list[str]:
    """Names of the options of a config group that have code: the public files of its folder."""
    folder = files("coeft") / FOLDERS[group]
    return sorted(f.name[:-3] for f in folder.iterdir() if f.name.endswith(".py") and not f.name.startswith("_"))


def methods_by_name() -> list[str]:
    """Names that a stack may pick: the options of conf/peft/, of which several may be of one kind."""
    folder = files("coeft.conf") / "peft"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml") and f.name != "none.yaml")


def preset(name: str) -> dict[str, Any]:
    """The settings of an option of conf/peft/, its kind among them."""
    return read_yaml(Path(str(files("coeft.conf") / "peft" / f"{name}.yaml")))


def settings_class(group: str, kind: str) -> type:
    """The dataclass of one option, such as LoRA for ("peft", "lora").

    Raises:
        UserError: the group has no such kind.
    """
    if kind not in kinds(group):
        raise UserError(f"{group}: no kind {kind!r}; {near(str(kind), kinds(group))}")
    module = import_module(f"coeft.{FOLDERS[group]}.{kind}")
    name = kind.replace("_", "")
    found = [value for key, value in vars(module).items() if key.lower() == name and isinstance(value, type)]
    assert len(found) == 1, f"coeft/{FOLDERS[group]}/{kind}.py must define one dataclass called like the file"
    return found[0]


def from_dict(
    tree: Mapping[str, Any],
    *,
    allowed: Allowed = NOTHING,
    locate: Callable[[str], str] = lambda key: "",
    mistakes: Iterable[str] = (),
) -> TrainConfig:
    """The checked config of a tree of plain values, as a config file or Hydra gives it.

    A method of `peft` without a `kind` is outside the stack: its settings are checked, then left out.

    Args:
        tree: key -> value, interpolations resolved: "${" that is left is meant literally. Paths that start with ~/
            are expanded.
        allowed: what the user has allowed beyond what files can say.
        locate: where a key was set, as a prefix of the message about it, such as "mine.yaml, line 3: ".
        mistakes: what the caller found wrong already, shown with the rest.
    Raises:
        UserError: everything that is wrong, one line each.
    """
    check = _Check(allowed, locate, list(mistakes))
    plain = _map_text(dict(tree), _expand_home)
    check.refuse_keys(plain)
    chosen: dict[str, Any] = {}
    for group in FOLDERS:
        node = plain.pop(group, MISSING if group != "peft" else {})
        chosen[group] = check.stack(node) if group == "peft" else check.option(group, node)
    plain["allow_custom_targets"] = allowed.custom_targets
    config = check.settings(TrainConfig, plain, "", skip=frozenset(FOLDERS))
    if check.mistakes or config is None:
        raise UserError(_listed(check.mistakes))
    return replace(config, **chosen)


def load_config(path: str | Path, *, allowed: Allowed = NOTHING) -> TrainConfig:
    """The checked config of a file that `to_yaml` wrote, such as RUN/config.yaml. The file may come from anybody.

    Raises:
        UserError: no such file, not YAML, or a config that `from_dict` refuses.
    """
    path = Path(path).expanduser()
    tree = read_yaml(path)
    wrong = [f"{path}: {text}" for text in refused_in_file(tree, allowed)]
    if wrong:
        raise UserError(_listed(wrong))
    try:
        plain = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    assert isinstance(plain, dict)
    return from_dict(
        {str(key): value for key, value in plain.items()},
        allowed=allowed,
        locate=lambda key: f"{path}: ",
    )


def allowed_by(*configs: TrainConfig) -> Allowed:
    """What was allowed to make these configs."""
    return Allowed(
        custom_targets=any(config.allow_custom_targets for config in configs),
        remote_code=any(getattr(config.backbone, "trust_remote_code", False) for config in configs),
    )


def refused_in_file(tree: Mapping[str, Any], allowed: Allowed) -> list[str]:
    """What only the user may say, in the raw content of a file: permissions, and what reads the surroundings.

    Args:
        tree: interpolations as they stand.
    """
    wrong = []
    if tree.get("allow_custom_targets") not in (None, False) and not allowed.custom_targets:
        wrong.append(
            "allow_custom_targets can only be typed on the command line: a file that could set it could run any code"
        )
    for key, value in _leaves(tree):
        for name in resolvers(value) if isinstance(value, str) else ():
            if name not in _HARMLESS:
                wrong.append(
                    f"{key}: ${{{name}:...}} is refused in a file, which must not read environment variables or run "
                    f"functions; write the value, or type it: {key}=VALUE"
                )
    return wrong


# interpolations with a function that know no more than the config itself, or the time
_HARMLESS = ("now", "oc.dict.keys", "oc.dict.values", "oc.select")


def resolvers(text: str) -> list[str]:
    """Names of the functions that OmegaConf would call for a value, such as oc.env for "${oc.env:HOME}"."""
    if "${" not in text:
        return []
    try:
        tree = parse(text)
    except GrammarParseError:
        return []  # resolving it is an error too, which says where
    found, rest = [], [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            found.append(node.resolverName().getText())
        rest += getattr(node, "children", None) or []
    return found


def literal(node: Any) -> Any:
    """A value in which OmegaConf takes every "${" as text."""
    return _map_text(node, lambda text: re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text))


def apply_overrides(config: TrainConfig, overrides: Mapping[str, Any], *, allowed: Iterable[str]) -> TrainConfig:
    """A finished run's config with other values, such as {"data.root": "/images"}, for what reads it again.

    A group's own key, as in {"data": "image_folder", "data.root": "/images"}, picks another option with its
    defaults; a mapping in place of the name gives its settings.

    Args:
        allowed: the first parts of keys that may be changed.
    Raises:
        UserError: another key, or a config that `from_dict` refuses.
    """
    allowed = list(allowed)
    tree = to_dict(config)
    wrong = []
    for key, value in sorted(overrides.items()):  # "data" before "data.root"
        head, *inner = key.split(".")
        if head not in allowed:
            wrong.append(f"{key}: only settings of {' and '.join(allowed)} can be changed here")
        elif not inner:
            tree[head] = {"kind": value} if head in FOLDERS and isinstance(value, str) else value
        else:
            node = tree[head]
            for part in inner[:-1]:
                node = node.setdefault(part, {})
            node[inner[-1]] = value
    return from_dict(tree, allowed=allowed_by(config), mistakes=wrong)


def method_settings(name: str, node: Mapping[str, Any], where: str) -> Any:
    """The settings object of one method, from plain values with its `kind`.

    Args:
        name: its name in the stack.
        where: the file that the values come from, for messages.
    Raises:
        UserError: an unknown kind or key, or a value of a wrong type or out of range.
    """
    check = _Check(NOTHING, lambda key: f"{where}: ", [])
    check.refuse_keys(node)
    settings = check.stack({name: {"kind": None, **node}})
    if check.mistakes:
        raise UserError(_listed(check.mistakes))
    return next(iter(settings.values()))


def to_yaml(config: TrainConfig, *, keep_run_dir: bool = False) -> str:
    """The config as YAML that `load_config` and `coeft train recipe=FILE` read back to an equal one.

    `run_dir` is written as null, so that repeating a run from its config makes a new one, and allow_custom_targets as
    false, which only the command line can change. Paths under the home folder are written ~/...

    Raises:
        UserError: a key that looks like a secret has a value.
    """
    shown = replace(config, allow_custom_targets=False)
    tree = to_dict(shown if keep_run_dir else replace(shown, run_dir=None))
    check = _Check(allowed_by(config), lambda key: "", [])
    check.refuse_keys(tree)
    if check.mistakes:
        raise UserError(_listed(check.mistakes))
    whole = re.compile(rf"^({_homes()})(?=/|$)")
    suite = _map_text(tree["suite"], shorten_override)
    tree = {**_map_text(tree, lambda text: whole.sub("~", text)), "suite": suite}
    return OmegaConf.to_yaml(OmegaConf.create(literal(tree)))  # quotes text that would be read back as another type


def _homes() -> str:
    """A pattern of the home folder, as it is called and as it is reached; of nothing where it is the root."""
    home = Path.home()
    names = {str(home), str(home.resolve())} - {"/"}
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"


def shorten_home(text: str) -> str:
    """Text in which the home folder is written as ~."""
    return re.sub(rf"(?<![\w.-])({_homes()})(?![\w-]|\.\w)", "~", text)


def shorten_override(text: str) -> str:
    """key=value in which paths under the home folder are written ~/..., as read_value and from_dict read them."""
    return re.sub(rf"([=\[{{,:\s]['\"]?)({_homes()})(?=[/'\",\]}}]|$)", r"\1~", text)


def to_dict(config: Any) -> dict[str, Any]:
    """The config, or the settings of one option, as plain values; a user's own class keeps its `_target_`."""
    tree: dict[str, Any] = {}
    own = not type(config).__module__.startswith("coeft.")
    if own:
        tree["_target_"] = f"{type(config).__module__}.{type(config).__qualname__}"
    for spec in fields(config):
        tree[spec.name] = _plain(getattr(config, spec.name), own)
    return tree


def _plain(value: Any, own: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value) if own else to_dict(value)  # inside a user's class its field says the type
    if isinstance(value, Mapping):
        return {key: _plain(item, own) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, own) for item in value]
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations as they stand.

    Raises:
        UserError: no such file, or not a mapping in YAML; names the file and the line.
    """
    try:
        _refuse_bombs(path)
        tree = OmegaConf.load(path)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a config") from None
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    plain = OmegaConf.to_container(tree)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


LARGEST_CONFIG = 1 << 20  # bytes
MOST_INTERPOLATIONS = 24  # of a file: each that names two others doubles the work
MOST_VALUES = 100_000  # of a config, its aliases written out


def _refuse_bombs(path: Path) -> None:
    """Refuse a file that is too large for a config, or whose aliases unfold to more than anyone writes.

    Raises:
        UserError, OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"no file {path}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a config")
    text = path.read_text(encoding="utf-8")
    if text.count("${") - text.count("\\${") > MOST_INTERPOLATIONS:
        raise UserError(f"{path}: more than {MOST_INTERPOLATIONS} interpolations ${{...}}; write the values out")
    if "*" not in text or "&" not in text:
        return
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES + 1  # what holds itself never ends
            children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
            flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(size, flat))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > MOST_VALUES:
        raise UserError(f"{path}: its aliases (*NAME) unfold to more than {MOST_VALUES:,} values; write them out")


def first_line(error: Exception) -> str:
    """The first line of OmegaConf's message, and the key it is about."""
    key = getattr(error, "full_key", None)
    return (f"{key}: " if key else "") + str(error).splitlines()[0]


def is_text(value: str) -> bool:
    """Whether files and paths can hold it: no zero byte, no half of a character."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def annotations(key: str) -> list[Any]:
    """The types that a dotted key may have: one for each option of its group that has the key; none if it is wrong."""
    head, *inner = key.split(".")
    if head in FOLDERS:
        inner = inner[1:] if head == "peft" else inner
        schemas: list[Any] = [settings_class(head, kind) for kind in kinds(head)] if inner else []
    else:
        schemas, inner = [TrainConfig], [head, *inner]
    for part in inner:
        hints = [_hints(schema) for schema in schemas if is_dataclass(schema)]
        schemas = [hint[part] for hint in hints if part in hint]
    return schemas


def _hints(schema: Any) -> dict[str, Any]:
    """Field -> type of a dataclass of settings; class variables are no keys."""
    hints = get_type_hints(schema)
    return {spec.name: hints[spec.name] for spec in fields(schema)}


def settings_from(
    schema: type,
    tree: Mapping[str, Any],
    where: str,
    *,
    locate: Callable[[str], str] = lambda key: "",
    mistakes: Iterable[str] = (),
) -> Any:
    """An object of a dataclass of settings, from plain values that are checked as those of a run's config are.

    Args:
        where: the key under which the values stand, such as "sweep".
        locate: as of from_dict.
        mistakes: what the caller found wrong already, shown with the rest.
    Raises:
        UserError: everything that is wrong, one line each.
    """
    check = _Check(NOTHING, locate, list(mistakes))
    plain = _map_text(dict(tree), _expand_home)
    check.refuse_keys(plain)
    built = check.settings(schema, plain, where)
    if check.mistakes:
        raise UserError(_listed(check.mistakes))
    return built


class _Check:
    """One pass over a config that collects what is wrong instead of stopping at the first."""

    def __init__(self, allowed: Allowed, locate: Callable[[str], str], mistakes: list[str]) -> None:
        self.allowed = allowed
        self.locate = locate
        self.mistakes = mistakes

    def wrong(self, key: str, message: str) -> None:
        line = self.locate(key) + message
        if line not in self.mistakes:
            self.mistakes.append(line)

    def refuse_keys(self, tree: Mapping[str, Any]) -> None:
        """Classes that the config names and code that comes with a model, unless allowed, and what looks secret."""
        for key, value in _leaves(tree):
            name = key.rpartition(".")[2]
            if name == "_target_" and not self.allowed.custom_targets:
                self.wrong(
                    key,
                    f"{key}: a config may name a class of your own only if you type allow_custom_targets=true on the "
                    "command line, since whoever names a class can run any code; coeft's own are named by kind",
                )
            if name == "trust_remote_code" and not self.allowed.remote_code and not _is_no(value):
                self.wrong(
                    key,
                    f"{key}: a file cannot allow the code that comes with a model; read that code, then type "
                    "backbone.trust_remote_code=true on the command line",
                )
            if value not in (None, "", [], {}) and _SECRET_KEY.search(name):
                self.wrong(key, f"{key} looks like a secret; leave it out of configs: {_place_of_secrets(key)}")
            if isinstance(value, str) and not is_text(value):
                self.wrong(key, f"{key}: {value!r} is no text: it holds a zero byte (null) or is not in UTF-8")
            if isinstance(value, str) and _SECRET_URL.search(value):
                self.wrong(key, f"{key} holds a password in an address; leave it out of configs")
            if isinstance(value, str) and (_SECRET_VALUE.search(value) or _is_wandb_key(key, value)):
                where = _place_of_secrets(key)
                self.wrong(key, f"{key} holds what looks like a token; leave it out of configs: {where}")

    def stack(self, node: Any) -> dict[str, Any]:
        """The methods of `peft` in their order."""
        if not isinstance(node, Mapping) or not all(isinstance(value, Mapping) for value in node.values()):
            self.wrong("peft", "peft: choose the stack by peft=[coeff,lora], a method's settings by peft.lora.rank=8")
            return {}
        methods = {}
        for name, settings in node.items():
            in_stack = "kind" in settings or "_target_" in settings
            if not in_stack and name not in methods_by_name():
                self.wrong(f"peft.{name}", f"peft.{name}: no such method; {near(str(name), methods_by_name())}")
                continue
            built = self._typed("peft", f"peft.{name}", settings if in_stack else {**preset(str(name)), **settings})
            if in_stack:
                methods[str(name)] = built
        return methods

    def option(self, group: str, node: Any) -> Any:
        """The settings of a group that has one option."""
        if node is None or node == MISSING:
            self.wrong(group, f"{group} is required: {group}=NAME; {near('', kinds(group))}")
        elif not isinstance(node, Mapping):
            self.wrong(
                group,
                f"{group}: {node!r} is not a mapping of settings; choose an option by {group}={node} on the command "
                f"line, or by - override /{group}: {node} in a recipe's defaults",
            )
        else:
            return self._typed(group, group, node)
        return None

    def _typed(self, group: str, where: str, node: Mapping[str, Any]) -> Any:
        settings = dict(node)
        target = settings.pop("_target_", None)
        kind = settings.get("kind")
        if target is not None:
            if not self.allowed.custom_targets:
                return None  # refuse_keys has said so
            try:
                schema = _custom_class(str(target))
            except UserError as error:
                self.wrong(f"{where}._target_", f"{where}._target_: {error}")
                return None
        elif not isinstance(kind, str) or kind not in kinds(group):
            if kind is None:
                message = f"{where} has settings but no kind: choose an option by {group}=NAME"
            else:
                message = f"{where}.kind: no kind {kind!r}; {near(str(kind), kinds(group))}"
            self.wrong(f"{where}.kind", message)
            return None
        else:
            schema = settings_class(group, kind)
        return self.settings(schema, settings, where)

    def settings(self, schema: type, node: Mapping[str, Any], where: str, skip: frozenset[str] = frozenset()) -> Any:
        """An object of the dataclass with these values; None if something is wrong. Keys in `skip` may be missing."""
        before = len(self.mistakes)
        filled = _unlocked(OmegaConf.structured(schema))
        given: list[str] = []
        self._fill(filled, node, where, "", given)
        missing = [key for key in sorted(OmegaConf.missing_keys(filled)) if key not in skip]
        for key in missing:
            full = _join(where, key)
            self.wrong(full, f"{full} is required: type {full}=VALUE, or set it in the recipe")
        if missing:
            return None
        for key in skip.intersection(OmegaConf.missing_keys(filled)):
            filled[key] = None  # the caller fills it in
        error = None
        if len(self.mistakes) == before:
            try:
                return OmegaConf.to_object(filled)
            except UserError as wrong:
                error = wrong
        self._ranges(schema, filled, where, given, skip)
        if error is not None and len(self.mistakes) == before:
            self.wrong(where, _under_its_name(str(error), where, filled))  # values that are wrong only together
        return None

    def _fill(self, filled: DictConfig, node: Mapping[str, Any], where: str, inside: str, given: list[str]) -> None:
        schema = OmegaConf.get_type(filled)
        assert is_dataclass(schema)
        hints = _hints(schema)
        for key, value in node.items():
            full = _join(where, str(key))
            if key not in hints:
                self.wrong(full, f"{full}: no such key; {near(str(key), hints)}")
                continue
            if value == MISSING:
                continue
            below = OmegaConf.get_type(filled, key)
            if is_dataclass(below) and isinstance(value, Mapping) and isinstance(filled[key], DictConfig):
                self._fill(filled[key], value, full, _join(inside, key), given)
                continue
            if is_dataclass(below) and value is not None and not isinstance(value, Mapping):
                keys = ", ".join(f"{full}.{spec.name}" for spec in fields(below))
                self.wrong(full, f"{full} is not a value of its own but has the keys {keys}; it cannot be {value!r}")
                continue
            try:
                OmegaConf.update(filled, key, literal(value), merge=False)
            except (OmegaConfBaseException, OverflowError):  # a whole number may be too large for a float
                self.wrong(full, f"{full} must be {_words(hints[key])}, not {_shown(value)}")
            else:
                given.append(_join(inside, key))

    def _ranges(self, schema: type, filled: DictConfig, where: str, given: list[str], skip: frozenset[str]) -> None:
        """Report every value that is out of its range, not only the one that __post_init__ met first."""
        required = [*OmegaConf.missing_keys(OmegaConf.structured(schema)), *skip]
        for key in given:
            alone = _unlocked(OmegaConf.structured(schema))
            for name in {*required, key}:
                value = OmegaConf.select(filled, name)  # of a container the raw nodes, of text what it means
                OmegaConf.update(alone, name, value if isinstance(value, Container) else literal(value), merge=False)
            try:
                OmegaConf.to_object(alone)
            except UserError as own:
                self.wrong(_join(where, key), _under_its_name(str(own), where, filled))


def _shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes whole numbers of up to 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


_SECRET_KEY = re.compile(
    r"secret|passw|credential|api_?key|access_?key|private_?key|^token$|(auth|access|api|hf|hub|wandb|bearer)_?token",
    re.IGNORECASE,
)
_SECRET_URL = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|[?&](token|access_token|api_?key|key|sig|signature|x-amz-signature|password)=",
    re.IGNORECASE,
)
# tokens that say what they are: Hugging Face, OpenAI and its like, GitHub, AWS, wandb's newer ones
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}"
    r"|wandb_v1_\w{20,})"
)


def looks_secret(name: str) -> bool:
    """Whether the name of a key or an environment variable is that of a secret."""
    return bool(_SECRET_KEY.search(name) or re.search(r"(^|_)(token|key|pass|pwd)$", name, re.IGNORECASE))


def _is_wandb_key(key: str, value: str) -> bool:
    return key.startswith("logger.") and bool(re.fullmatch(r"[0-9a-f]{40}", value))


def _place_of_secrets(key: str) -> str:
    if key.startswith("logger."):
        return "wandb takes its key from `wandb login` or the environment variable WANDB_API_KEY"
    if key.split(".")[0] in ("backbone", "data"):
        return "the Hugging Face hub takes its token from `hf auth login` or the environment variable HF_TOKEN"
    return "what needs it takes it from an environment variable or from its own login"


def _is_no(value: Any) -> bool:
    """Whether a value given for true or false is empty or false."""
    return value in (None, False) or str(value).lower() in ("false", "no", "off", "0", "n", "f")


def _under_its_name(message: str, where: str, settings: DictConfig) -> str:
    """What the settings of a method say of peft.KIND, said of its name in the stack."""
    kind = settings.get("kind")
    if not where.startswith("peft.") or not isinstance(kind, str):
        return message
    return re.sub(rf"\bpeft\.{re.escape(kind)}\b", where, message)


def _custom_class(target: str) -> type:
    """The dataclass that a user's `_target_` names."""
    module, _, name = target.rpartition(".")
    if not module:
        raise UserError(f"{target!r} must be a module and a class, such as my_methods.Mine")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{error}; is its folder on PYTHONPATH?") from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise UserError(f"{target} is not a dataclass")
    return found


def _unlocked(node: DictConfig) -> DictConfig:
    """The node with what frozen dataclasses made read-only writable again."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _unlocked(node[key])
    return node


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _leaves(tree: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a tree that is not a mapping; an empty mapping counts as a value."""
    for key, value in tree.items():
        full = _join(inside, str(key))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, full)
            continue
        yield full, value
        for number, item in enumerate(value if isinstance(value, list | tuple) else ()):
            yield from _leaves({f"{number}": item}, full)


def _map_text(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, Mapping):
        return {str(key): _map_text(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_map_text(item, change) for item in node]
    return node


def _expand_home(text: str) -> str:
    return str(Path.home()) + text[1:] if text == "~" or text.startswith("~/") else text


def _words(annotation: Any) -> str:
    """A type as a user would say it."""
    if get_origin(annotation) in (Union, UnionType):
        options = [_words(option) for option in get_args(annotation) if option is not type(None)]
        return " or ".join([*options, "null"] if type(None) in get_args(annotation) else options)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) in (list, tuple, Sequence):
        items = {int: " of whole numbers", float: " of numbers", str: " of texts"}
        arguments = get_args(annotation)
        return "a list" + (items.get(arguments[0], "") if arguments else "")
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return "a mapping from names" + ("" if value is Any else f" to {_words(value)}")
    return str(annotation)


def _listed(mistakes: list[str], most: int = 12) -> str:
    """The lines, the first ones if there are many."""
    rest = len(mistakes) - most
    return "\n".join(mistakes[:most] + ([f"and {rest} more"] if rest > 0 else []))

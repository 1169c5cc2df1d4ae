"""The schema of a run. Imports neither torch nor Hydra, so that a wrong key is an error in a third of a second.

Each group's options are dataclasses beside what they configure (`coeft/methods/lora.py` holds `LoRA`), found by
their `kind`: the name of the file. The command line fills them from YAML and overrides; Python users build them.
"""

from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from importlib.resources import files
from typing import Any

from omegaconf import MISSING

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
    micro_batch_size: int | None = None
    """Samples per device and forward; null is the whole batch. Accumulation follows from data.batch_size."""
    precision: str = "auto"
    """auto, fp32 or bf16; auto is bf16 on a CUDA device that has it, else fp32."""
    devices: Any = 1
    """Number of devices, or auto."""
    strategy: str = "auto"
    """Lightning's strategy, such as ddp."""
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
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"trainer.precision must be auto, fp32 or bf16, not {self.precision!r}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"trainer.threads must be 1 or more, or null, not {self.threads}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run."""

    recipe: str | None = None
    """Name of the recipe, or null."""
    suite: dict[str, list[str]] = field(default_factory=dict)
    """Runs of a suite: name -> overrides. Empty is one run."""
    seeds: list[int] = field(default_factory=list)
    """Repeat every run with each of these seeds. Empty is `seed` alone."""
    seed: int = 0
    run_dir: str | None = None
    """Folder of the run; null is runs/RECIPE/TIME."""
    dry_run: bool = False
    allow_custom_targets: bool = False
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


def settings_class(group: str, kind: str) -> type:
    """The dataclass of one option, such as LoRA for ("peft", "lora").

    Raises:
        UserError: the group has no such kind.
    """
    if kind not in kinds(group):
        raise UserError(f"{group}: no kind {kind!r}; {near(str(kind), kinds(group))}")
    module = import_module(f"coeft.{FOLDERS[group]}.{kind}")
    name = kind.replace("_", "")
    found = [value for key, value in vars(module).items() if key.lower() == name and is_dataclass(value)]
    assert len(found) == 1, f"coeft/{FOLDERS[group]}/{kind}.py must define one dataclass called like the file"
    return found[0]

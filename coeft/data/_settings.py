"""Settings that every kind of image data has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from omegaconf import MISSING

from coeft.errors import UserError, near

if TYPE_CHECKING:
    from coeft.data._source import Source

PARTS = ("train", "val", "test")
AUGMENTATIONS = ("flip", "random_resized_crop", "randaugment")
AUTO = "auto"
USUAL = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Which images are used, how they are resized, and how they are fed."""

    kind: str = ""
    splits: dict[str, str | None] = field(default_factory=lambda: {"train": "train", "val": None, "test": "test"})
    """train, val and test -> the name that the source gives this split; null is none."""
    n_train: int | None = None
    """Images of the training part, class-balanced, drawn from the seed; null is all."""
    n_val: int | None = None
    """The same for the validation part; taken out of the training part if the data has no validation split, then in
    whole groups that come near the number, if cv.group is set."""
    n_test: int | None = None
    """The same for the test part."""
    fraction: float | None = None
    """Share of the training part, in (0, 1], that keeps its class proportions; null is all."""
    shots: int | None = None
    """Samples of each class in the training part, drawn from the seed; null is all."""
    test_fraction: float | None = None
    """Share of the training split, in (0, 1), that is set apart as the test split where the data has none; keeps the
    class proportions, and groups whole; null is none."""
    balance: float = 0.0
    """How even the classes are made in training batches, in [0, 1]: 0 draws every sample once an epoch; 1 draws every
    class equally often, rare ones again and again; between, a class of share f in proportion to f^(1 - balance)."""
    batch_size: int = 64
    """Samples per optimizer step, over all devices."""
    num_workers: int = 0
    """Processes that fetch batches, and threads that decode images; 0 fetches in the main process."""
    on_error: str = "raise"
    """raise or skip: what an unreadable image does. Skipped images are counted and listed."""
    image_size: int | None = None
    """Height and width in pixels; null is the backbone's."""
    resize: str | None = None
    """crop: resize the shorter side, crop the centre. squash: resize both sides. null: the backbone's."""
    interpolation: str | None = None
    """bicubic, bilinear or nearest; null is the backbone's."""
    mean: list[float] | None = None
    """Per channel, of pixels scaled to [0, 1]; null is the backbone's."""
    std: list[float] | None = None
    crop_pct: float | None = None
    """Share of the resized shorter side that the centre crop keeps (resize=crop only); null is the backbone's."""
    augment: list[str] = field(default_factory=list)
    """Any of flip, random_resized_crop, randaugment, applied in this order to training batches."""

    def __post_init__(self) -> None:
        for key in self.splits:
            if key not in PARTS:
                raise UserError(f"data.splits has no key {key!r}; {near(str(key), PARTS)}")
        for key in ("n_train", "n_val", "n_test", "shots", "image_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"data.{key} must be 1 or more, or null, not {value}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(f"data.fraction must be in (0, 1], or null, not {self.fraction}")
        given = [f"data.{key}" for key in ("n_train", "fraction", "shots") if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} choose the training samples; set all but one to null")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(f"data.test_fraction must be in (0, 1), or null, not {self.test_fraction}")
        if self.test_fraction is not None and self.n_test is not None:
            raise UserError("data.test_fraction and data.n_test both choose the test part; set one of them to null")
        if not 0 <= self.balance <= 1:
            raise UserError(f"data.balance must be in [0, 1], not {self.balance}")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size must be 1 or more, not {self.batch_size}")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers must be 0 or more, not {self.num_workers}")
        if self.on_error not in ("raise", "skip"):
            raise UserError(f"data.on_error must be raise or skip, not {self.on_error!r}")
        if self.resize not in (None, "crop", "squash"):
            raise UserError(f"data.resize must be crop, squash or null, not {self.resize!r}")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"data.interpolation must be one of {', '.join(INTERPOLATIONS)}, not {self.interpolation!r}"
            )
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"data.crop_pct must be in (0, 1], or null, not {self.crop_pct}")
        for value in self.mean or []:
            if not math.isfinite(value):
                raise UserError(f"data.mean must be finite numbers, not {list(self.mean or [])}")
        for value in self.std or []:
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"data.std must be positive numbers, not {list(self.std or [])}")
        for name in self.augment:
            if name not in self.augmentations:
                raise UserError(f"data.augment: no augmentation {name!r}; {near(str(name), self.augmentations)}")
        if len(set(self.augment)) < len(self.augment):
            raise UserError(f"data.augment names an augmentation twice: {', '.join(self.augment)}")

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    """What the samples can be read as: image, text, audio."""
    targets: ClassVar[tuple[str, ...]] = ("class",)
    """What can be learnt from them: class, classes (several of them), number, text, choice."""

    augmentations: ClassVar[tuple[str, ...]] = AUGMENTATIONS
    """What `augment` may name."""

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        """The splits with their labels; images are not decoded yet, text is not tokenised.

        Args:
            seed: of draws that the source itself makes, if any.
            group: column whose values `Split.groups` holds; null is none.
            modality: what the backbone takes, one of `modalities`.
            target: what the task learns, one of `targets`.

        Raises:
            UserError: the data is missing, broken, or has no such split or column.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Whatever can be found missing in a few seconds, before torch is imported: data that only a network has.

        Raises:
            UserError: the data is neither here nor to be had.
        """

    def split_name(self, part: str) -> str | None:
        """The source's name of train, val or test, or None."""
        return self.splits.get(part)


@dataclass(frozen=True, kw_only=True)
class RowData(ImageData):
    """Rows with columns: texts, pairs of texts, or images, with one label or several, a number or a text to learn."""

    max_length: int | None = None
    """Tokens of a text, longer ones are cut; null is what the model takes, at most 512."""
    pad_multiple: int = 1
    """Batches of text are padded to a multiple of so many tokens; 8 suits tensor cores."""
    label_separator: str | None = None
    """What separates several labels in a cell of text, such as ";"; null where they are a list, or columns."""

    chat_template: str | None = None
    """File with a Jinja chat template in the place of the tokenizer's own."""
    first_choice: int = 0
    """Number of the first choice where the label counts them, for multiple choice: 0 or 1."""

    modalities: ClassVar[tuple[str, ...]] = ("text", "image")
    targets: ClassVar[tuple[str, ...]] = ("class", "classes", "number", "text", "choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"data.max_length must be 1 or more, or null, not {self.max_length}")
        if self.first_choice not in (0, 1):
            raise UserError(f"data.first_choice must be 0 or 1, not {self.first_choice}")
        if self.pad_multiple < 1:
            raise UserError(f"data.pad_multiple must be 1 or more, not {self.pad_multiple}")
        if self.label_separator is not None and not self.label_separator.strip(" "):
            raise UserError("data.label_separator must be a mark such as ';', or null")

    def fields(self, modality: str, target: str) -> "dict[str, tuple[str, str]]":
        """What of a row a model gets: name -> (column, setting that names it).

        Names are text, with pair for pairs; image; for target=text: messages, or prompt and completion, or text; and
        for target=choice: question and choices, or question and choice_0, choice_1, ...

        Raises:
            UserError: the settings do not go together.
        """
        raise NotImplementedError


IMAGE_SETTINGS = ("image_size", "resize", "interpolation", "mean", "std", "crop_pct", "augment")


def check_text(settings: ImageData, backbone: str) -> None:
    """Refuse data without text for a backbone that reads texts, and settings that only images have.

    Raises:
        UserError: either.
    """
    if "text" not in settings.modalities:
        raise UserError(
            f"data={settings.kind} has no text, but {backbone} reads texts: data=table or data=hub may have some"
        )
    given = [f"data.{key}" for key in IMAGE_SETTINGS if getattr(settings, key)]
    if given:
        raise UserError(f"{', '.join(given)}: of images, but {backbone} reads texts; leave out")


def is_columns(value: object) -> bool:
    """Whether a setting names one column, or several."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name.strip() for name in value)


def text_fields(
    target: str,
    *,
    text: tuple[str | None, str],
    pair: tuple[str | None, str],
    prompt: tuple[str | None, str],
    completion: tuple[str | None, str],
    messages: tuple[str | None, str],
    choices: tuple[str | list[str] | None, str],
) -> dict[str, tuple[str, str]]:
    """See RowData.fields, for text; each argument is a column, or None, and the setting that names it.

    Several columns of choices hold one each.

    Raises:
        UserError: a prompt without a completion, or chats and prompts at once.
    """
    if target == "choice":
        named = {"question": text, **_choice_fields(*choices)}
    elif target != "text":
        named = {"text": text, "pair": pair}
    elif messages[0] is not None:
        if prompt[0] is not None or completion[0] is not None:
            raise UserError(f"{messages[1]} and {prompt[1]}, {completion[1]} name two kinds of data; set one to null")
        named = {"messages": messages}
    elif completion[0] is not None:
        if prompt[0] is None:
            raise UserError(f"{completion[1]}={completion[0]} needs {prompt[1]}=COLUMN")
        named = {"prompt": prompt, "completion": completion}
    elif prompt[0] is not None:
        raise UserError(f"{prompt[1]}={prompt[0]} needs {completion[1]}=COLUMN")
    else:
        named = {"text": text}
    return {name: (column, key) for name, (column, key) in named.items() if column is not None}


def _choice_fields(columns: str | list[str] | None, key: str) -> dict[str, tuple[str | None, str]]:
    if columns is None:
        raise UserError(f"{key} is missing: name the column that holds the list of choices, or several columns")
    if isinstance(columns, str):
        return {"choices": (columns, key)}
    return {f"choice_{number}": (column, key) for number, column in enumerate(columns)}


def required(key: str, value: str | None, example: str) -> str:
    """The value of a setting that has no default.

    Raises:
        UserError: it was not given.
    """
    if value is None or value == MISSING or not str(value).strip():
        raise UserError(f"{key} is missing: give it as {key}={example}")
    return str(value)


def no_groups(kind: str, group: str | None) -> None:
    """Refuse a group column for data that has no columns."""
    if group is not None:
        raise UserError(f"cv.group={group}: data={kind} has no column to group by; set cv.group=null")


def usual_name(part: str, names: list[str]) -> str | None:
    """The split among `names` that is commonly used as train, val or test, in any case; None if there is none."""
    for usual in USUAL[part]:
        for name in names:
            if name.lower() == usual:
                return name
    return None


def choose_splits(
    settings: ImageData, names: list[str], *, source: str, parts: Sequence[str] = PARTS
) -> dict[str, str | None]:
    """train, val, test -> name of a split that exists, or None; `auto` is the split of a usual name if there is one.

    Args:
        parts: those that are looked for; the others are told elsewhere.

    Raises:
        UserError: a name is not among `names`, two parts name the same split, or there is none for training.
    """
    chosen = {part: settings.split_name(part) for part in parts}
    for part, name in chosen.items():
        if name == AUTO and AUTO not in names:
            chosen[part] = usual_name(part, names)
            if part == "train" and chosen[part] is None:
                if len(names) > 1:
                    listed = ", ".join(names)
                    raise UserError(f"data.splits.train: {source} has no split called train; name one of {listed}")
                chosen[part] = names[0]
    for part, name in chosen.items():
        if name is not None and name not in names:
            raise UserError(f"data.splits.{part}: {source} has no split {name!r}; {near(name, names)}")
    if "train" in parts and chosen["train"] is None:
        raise UserError(f"data.splits.train is null: there is nothing to train on; {source} has {', '.join(names)}")
    used = [name for name in chosen.values() if name is not None]
    for name in used:
        if used.count(name) > 1:
            parts = " and ".join(f"data.splits.{part}" for part, other in chosen.items() if other == name)
            raise UserError(f"{parts} both name {name!r}: the same samples would train and test; set one to null")
    return chosen

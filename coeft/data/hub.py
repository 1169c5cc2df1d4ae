"""A Hugging Face data set of images: by its name on the Hub, or a local folder or file that `datasets` reads."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from coeft.data._settings import AUTO, PARTS, ImageData, choose_splits, required

if TYPE_CHECKING:
    from coeft.data._source import Source


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns."""

    image: str = "image"
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class Hub(ImageData):
    """Any data set with a column of images and one of labels (class labels, integers or text)."""

    kind: str = "hub"
    splits: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(PARTS, AUTO))
    """train, val, test -> split of the data set; auto: the one of a usual name if there is one."""
    name: str = MISSING
    """Such as uoft-cs/cifar100, or a folder (class folders, parquet files, save_to_disk), or a parquet file."""
    config: str | None = None
    """Configuration of the data set, if it has several."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    columns: Columns = field(default_factory=Columns)
    cache_dir: str | None = None
    """Where `datasets` keeps its files; null is its own choice."""

    def check(self) -> None:
        self.load(0)

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        name = required("data.name", self.name, "NAME_OR_FOLDER")

        from coeft.data._hub import load_hub, read_splits
        from coeft.data._source import Source

        ways = "give a local copy: data.name=FOLDER (class folders or parquet files) or data.name=FILE.parquet"
        tables = load_hub(name, config=self.config, revision=self.revision, cache_dir=self.cache_dir, ways=ways)
        chosen = choose_splits(self, list(tables), source=f"data.name={name}")
        splits, classes = read_splits(
            tables,
            chosen,
            image=self.columns.image,
            label=self.columns.label,
            group=group,
            keys=("data.columns.image", "data.columns.label"),
        )
        train = splits["train"]
        assert train is not None
        return Source(train=train, val=splits["val"], test=splits["test"], class_names=classes)

"""VTAB-1k: nineteen tasks of 800 + 200 training images each (Zhai et al. 2019, arXiv:1910.04867).

The common local format: ROOT/TASK/ with train800.txt, val200.txt, train800val200.txt and test.txt, one
`relative/path label` a line, and the images below ROOT/TASK/. Published numbers depend on how these files were
exported: on CIFAR-100, JPEG exports and the original pixels are about ten points apart.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from coeft.data._settings import ImageData, choose_splits, no_groups, required
from coeft.data.hub import Columns
from coeft.errors import UserError

if TYPE_CHECKING:
    from coeft.data._source import Source

LISTS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True, kw_only=True)
class VTAB(ImageData):
    """One task, from the local folder format, or its parent data set on the Hub.

    The Hub has the parent data sets, not VTAB's choice of 1,000 training images: from there, 800 + 200 are drawn
    by the seed, class-balanced, and a warning says so.
    """

    kind: str = "vtab"
    splits: dict[str, str | None] = field(
        default_factory=lambda: {"train": "train800", "val": "val200", "test": "test"}
    )
    """train, val, test -> list file without .txt: train800, val200, train800val200 or test."""
    name: str = MISSING
    """Task: the name of its folder, such as cifar100; the folder may also have the short name in use, such as cifar."""
    num_classes: int | None = None
    """Classes that the task has: labels are 0 to one less. null takes the largest label in the lists."""
    num_test: int | None = None
    """Images that the task's test set has; another number is told. null is not checked."""
    root: str | None = None
    """Folder of the tasks, or of this task; null reads hub_name."""
    hub_name: str | None = None
    """Parent data set on the Hub, for root=null; null is none."""
    hub_config: str | None = None
    hub_columns: Columns = field(default_factory=Columns)
    hub_splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    """Splits of the parent data set: training images are drawn from train, test is used whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_classes", "num_test"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"data.{key} must be 1 or more, or null, not {value}")
        if set(self.hub_splits) != {"train", "test"}:
            raise UserError(f"data.hub_splits must name train and test, not {', '.join(self.hub_splits) or 'nothing'}")

    def check(self) -> None:
        if self.root is None:
            self.load(0)
        else:
            from coeft.data._vtab import check_lists

            check_lists(self, required("data.name", self.name, "TASK"), self._chosen())

    def _chosen(self) -> dict[str, str | None]:
        """train, val, test -> list.

        Raises:
            UserError: one holds another.
        """
        chosen = choose_splits(self, list(LISTS), source="VTAB-1k")
        if "train800val200" in chosen.values() and {"train800", "val200"} & set(chosen.values()):
            raise UserError(
                "data.splits names train800val200 and a part of it: the same images would train and validate; "
                "with train=train800val200, set data.splits.val=null"
            )
        return chosen

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        from coeft.data._vtab import from_folder, from_hub

        name = required("data.name", self.name, "TASK")
        no_groups(self.kind, group)
        chosen = self._chosen()
        if self.root is not None:
            return from_folder(self, name, chosen)
        return from_hub(self, name, chosen, seed)

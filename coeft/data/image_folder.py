"""Images in class folders: ROOT/CLASS/image.jpg, or ROOT/{train,val,test}/CLASS/image.jpg.

Any format that Pillow reads, at any depth below the class folder; hidden files are left out. EXIF orientation is
applied, transparency is laid over white, 16 bits are scaled to 8. An optional table ROOT/groups.csv with a column
`path` (relative to ROOT) and further columns lets `cv.group=COLUMN` keep images together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from omegaconf import MISSING

from coeft.data._settings import AUTO, PARTS, USUAL, ImageData, choose_splits, required, usual_name
from coeft.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from coeft.data._source import Source


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageData):
    """Class folders below `root`, which may be divided into split folders."""

    kind: str = "image_folder"
    splits: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(PARTS, AUTO))
    """train, val, test -> folder in root; auto: the folder of a usual name if there is one, else root for train."""
    root: str = MISSING
    missing_classes: bool = False
    """Allow val and test to lack some classes of train."""

    wanted: ClassVar[str] = "image"
    """What is looked for: a key of coeft.data._folders.WANTED."""

    def load(self, seed: int, group: str | None = None, *, modality: str = "image", target: str = "class") -> "Source":
        from pathlib import Path

        from coeft.data._folders import WANTED, existing_folder, read_split
        from coeft.data._source import Source, Split

        root = existing_folder(Path(required("data.root", self.root, "FOLDER")).expanduser(), "data.root")
        warnings: list[str] = []
        splits: dict[str, Split | None] = {}
        classes: list[str] = []
        for part, folder in self._folders(root).items():
            if folder is None:
                splits[part] = None
                continue
            split, names = read_split(root, folder, warnings, WANTED[self.wanted])
            if part == "train":
                classes = names
            else:
                split = self._relabelled(split, names, classes, folder)
            splits[part] = split
        if group is not None:
            for part_split in splits.values():
                if part_split is not None:
                    part_split.groups = self.group_names(root, group, list(part_split.names))
        train = splits["train"]
        assert train is not None
        return Source(train=train, val=splits["val"], test=splits["test"], class_names=classes, warnings=warnings)

    def group_names(self, root: "Path", group: str, names: Sequence[str]) -> "np.ndarray":
        """The group of each file, (N,) of str: the column `group` of ROOT/groups.csv.

        Args:
            names: paths relative to root.

        Raises:
            UserError: no such file or column, or files without a row.
        """
        from coeft.data._folders import groups_of, read_groups

        return groups_of(list(names), read_groups(root, group), root)

    def _folders(self, root: "Path") -> "dict[str, Path | None]":
        """train, val, test -> folder."""
        from coeft.data._folders import WANTED, class_folders, files_below

        wanted = WANTED[self.wanted]
        inside = class_folders(root)
        train = self.split_name("train")
        if train == AUTO:
            usual = usual_name("train", list(inside))
            # A folder `train` of files without class folders in it may be a class of that name.
            divided = usual is not None and any(
                files_below(path, wanted).files for path in class_folders(inside[usual]).values()
            )
        else:
            divided = train != "."
        if divided:
            chosen = choose_splits(self, list(inside), source=f"data.root={root}")
            return {part: None if name is None else inside[name] for part, name in chosen.items()}
        known = {name for names in USUAL.values() for name in names}
        if inside and all(name.lower() in known for name in inside):
            listed = ", ".join(inside)
            raise UserError(
                f"{root} has {listed}, but no train/CLASS/{wanted.example}: put class folders with {wanted.plural} "
                "into train"
            )
        for part in ("val", "test"):
            if self.split_name(part) not in (None, AUTO):
                raise UserError(
                    f"data.splits.{part}={self.split_name(part)}: {root} has class folders, no folders of splits; "
                    f"set data.splits.train to a folder in it, or data.splits.{part}=null"
                )
        return {"train": root, "val": None, "test": None}

    def _relabelled(self, split, names: list[str], classes: list[str], folder: "Path"):  # noqa: ANN001, ANN202
        """The split with labels that count in the training classes."""
        import numpy as np

        from coeft.errors import near

        extra = [name for name in names if name not in classes]
        lacking = [name for name in classes if name not in names]
        problems = [f"{folder / name}: train has no class {name!r}; {near(name, classes)}" for name in extra]
        if lacking and not self.missing_classes:
            listed = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            problems.append(
                f"{folder} lacks {len(lacking)} of train's {len(classes)} classes: {listed} "
                "(data.missing_classes=true allows that)"
            )
        if problems:
            raise UserError("\n".join([*problems, "every split must have the same class folders"]))
        split.labels = np.array([classes.index(name) for name in names], np.int64)[split.labels]
        return split

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

    from coeft.data._folders import ClassFolders
    from coeft.data._listing import Listing
    from coeft.data._source import Source, Split


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
        from coeft.data._listing import Listing
        from coeft.data._source import Source, Split

        root = existing_folder(Path(required("data.root", self.root, "FOLDER")).expanduser(), "data.root")
        listing = Listing(root)
        warnings: list[str] = []
        skipped: list[str] = []
        wanted = WANTED[self.wanted]
        folders = {part: folder for part, folder in self._folders(root, listing).items() if folder is not None}
        read = {part: read_split(root, folder, warnings, wanted, listing=listing) for part, folder in folders.items()}
        listing.save()
        empty = [what for found in read.values() for what in found.empty.values()]
        if empty and self.on_error == "raise":
            advice = f"put {wanted.plural} there, remove the folder, or set data.on_error=skip to go on without"
            raise UserError("\n".join([*(str(root / what) for what in empty), advice]))
        classes, left_out = read["train"].classes, set(read["train"].empty)
        splits: dict[str, Split | None] = {"train": read["train"].split, "val": None, "test": None}
        for part in ("val", "test"):
            if part in read:
                splits[part] = self._relabelled(read[part], classes, left_out, folders[part], skipped)
        if group is not None:
            for part_split in splits.values():
                if part_split is not None:
                    part_split.groups = self.group_names(root, group, list(part_split.names))
        train = splits["train"]
        assert train is not None
        return Source(
            train=train,
            val=splits["val"],
            test=splits["test"],
            class_names=classes,
            warnings=warnings,
            skipped=skipped,
            empty=empty,
        )

    def group_names(self, root: "Path", group: str, names: Sequence[str]) -> "np.ndarray":
        """The group of each file, (N,) of str: the column `group` of ROOT/groups.csv.

        Args:
            names: paths relative to root.

        Raises:
            UserError: no such file or column, or files without a row.
        """
        from coeft.data._folders import groups_of, read_groups

        return groups_of(list(names), read_groups(root, group), root)

    def _folders(self, root: "Path", listing: "Listing") -> "dict[str, Path | None]":
        """train, val, test -> folder."""
        from coeft.data._folders import WANTED, class_folders, files_below

        wanted = WANTED[self.wanted]
        inside = class_folders(root, listing)
        train = self.split_name("train")
        if train == AUTO:
            usual = usual_name("train", list(inside))
            # A folder `train` of files without class folders in it may be a class of that name.
            divided = usual is not None and any(
                files_below(path, wanted, listing).files for path in class_folders(inside[usual], listing).values()
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

    def _relabelled(
        self, found: "ClassFolders", classes: list[str], left_out: set[str], folder: "Path", skipped: list[str]
    ) -> "Split":
        """The split with labels that count in the training classes.

        Args:
            left_out: class folders of the training split without a file; files of theirs are left out too.
            skipped: gets the names of those.
        """
        import numpy as np

        from coeft.data._folders import WANTED
        from coeft.errors import near

        split, names = found.split, found.classes
        extra = [name for name in names if name not in classes and name not in left_out]
        lacking = [name for name in classes if name not in names and name not in found.empty]
        problems = [f"{folder / name}: train has no class {name!r}; {near(name, classes)}" for name in extra]
        if lacking and not self.missing_classes:
            listed = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            problems.append(
                f"{folder} lacks {len(lacking)} of train's {len(classes)} classes: {listed} "
                "(data.missing_classes=true allows that)"
            )
        if problems:
            raise UserError("\n".join([*problems, "every split must have the same class folders"]))
        positions = np.array([classes.index(name) if name in classes else -1 for name in names], np.int64)
        split.labels = positions[split.labels]
        noun = WANTED[self.wanted].noun
        unknown = np.flatnonzero(split.labels < 0)
        skipped += [f"{split.names[row]}: the training split has no {noun} of its class" for row in unknown.tolist()]
        return split.subset(np.flatnonzero(split.labels >= 0)) if len(unknown) else split

"""Finding images or sounds in folders."""

import csv
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coeft.data._decode import extensions
from coeft.data._listing import Listing
from coeft.data._source import Paths, Split
from coeft.errors import UserError, near

GROUPS_FILE = "groups.csv"
LISTED = 5  # names that a message lists


# what libsndfile reads without being told the format; lower case, with the dot
SOUND_EXTENSIONS = frozenset(".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64".split())


@dataclass(frozen=True)
class Wanted:
    """Files that are samples."""

    noun: str
    plural: str
    example: str
    """Name of a file."""
    extensions: Callable[[], frozenset[str]]
    """Lower case, with the dot."""


IMAGES = Wanted("image", "images", "image.jpg", extensions)
SOUNDS = Wanted("sound", "sounds", "clip.wav", lambda: SOUND_EXTENSIONS)
WANTED = {"image": IMAGES, "sound": SOUNDS}


@dataclass
class Found:
    """Files below a folder, sorted; hidden ones are not there."""

    files: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    """Files that are not wanted, by their extension."""


def existing_folder(path: Path, key: str) -> Path:
    """The folder.

    Raises:
        UserError: there is none, with near names beside it.
    """
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{key}={path} is a file; give the folder")
    parent = path.parent
    hint = ""
    if parent.is_dir():
        beside = [other.name for other in visible(parent) if other.is_dir()]
        hint = f"; in {parent}: {near(path.name, beside)}"
    else:
        while not parent.is_dir() and parent != parent.parent:
            parent = parent.parent
        hint = f"; what exists of it is {parent}"
    raise UserError(f"{key}={path}: no such folder{hint}")


def visible(folder: Path) -> list[Path]:
    """What a folder holds, without hidden names, sorted.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


def files_below(folder: Path | str, wanted: Wanted = IMAGES, listing: Listing | None = None) -> Found:
    """All files below a folder, through symbolic links too.

    Args:
        listing: what is remembered of folders.

    Raises:
        UserError: a folder cannot be read.
    """
    known, found, listing = wanted.extensions(), Found(), listing or Listing()
    above: set[tuple[int, int]] = set()

    def walk(here: str) -> None:
        this = listing.held(here).state[:2]
        if this in above:  # a link to a folder that it lies in
            return
        above.add(this)
        for path, name, is_folder in listing.entries(here):
            if is_folder:
                walk(path)
            elif _extension(name) in known:
                found.files.append(path)
            else:
                found.other.append(path)
        above.remove(this)

    walk(str(folder))
    return found


def file_inputs(paths: Sequence[str | os.PathLike[str]], wanted: Wanted) -> Split:
    """Samples to predict: files, and all that are wanted below folders, sorted; labels are -1, names paths as given.

    Raises:
        UserError: a path does not exist, or a folder has none.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = files_below(path, wanted).files
            if not found:
                raise UserError(f"{given}: the folder has no {wanted.noun}")
            files += map(Path, found)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{given}: no such file or folder")
    if not files:
        raise UserError(f"no input: give {wanted.noun} files or folders")
    return Split(items=files, labels=np.full(len(files), -1, np.int64), names=[str(path) for path in files])


def class_folders(folder: Path, listing: Listing | None = None) -> dict[str, Path]:
    """Class name -> its folder, sorted by name. Names are in Unicode's NFC, which file systems differ in.

    Raises:
        UserError: two folders have the same name then.
    """
    classes: dict[str, Path] = {}
    for path, plain, is_folder in (listing or Listing()).entries(str(folder)):
        if not is_folder:
            continue
        name = unicodedata.normalize("NFC", plain)
        if name in classes:
            raise UserError(
                f"{folder} has two class folders called {name!r} that differ in their Unicode form; join them"
            )
        classes[name] = Path(path)
    return dict(sorted(classes.items()))


@dataclass(kw_only=True)
class ClassFolders:
    """The files of FOLDER/CLASS/..."""

    split: Split
    """Labels are positions in `classes`."""
    classes: list[str]
    """Those with a file."""
    empty: dict[str, str] = field(default_factory=dict)
    """Class without a file -> its folder relative to root, and what is there."""


def read_split(
    root: Path, folder: Path, warnings: list[str], wanted: Wanted = IMAGES, *, listing: Listing | None = None
) -> ClassFolders:
    """The files of FOLDER/CLASS/..., named relative to root.

    Args:
        warnings: gets one about other files.

    Raises:
        UserError: there is no class folder, or none with a file that is wanted.
    """
    listing = listing or Listing()
    classes = class_folders(folder, listing)
    known = wanted.extensions()
    loose = [
        path for path, name, is_folder in listing.entries(str(folder)) if not is_folder and _extension(name) in known
    ]
    if not classes:
        has = f"has {len(loose)} {wanted.plural} but no class folder" if loose else "has no class folder"
        raise UserError(f"{folder} {has}; expected {folder.name}/CLASS/{wanted.example}")
    cut = len(os.path.join(root, ""))
    items: list[str] = []
    counts: dict[str, int] = {}
    empty: dict[str, str] = {}
    ignored = loose
    for name, path in classes.items():
        found = files_below(path, wanted, listing)
        if not found.files:
            only = f"only {os.path.basename(found.other[0])}" if found.other else "it is empty"
            has = f"{len(found.other)} other files" if len(found.other) > 1 else only
            empty[name] = f"{_shown(str(path)[cut:])}: the class folder has no {wanted.noun} ({has})"
            continue
        items += found.files
        counts[name] = len(found.files)
        ignored += found.other
    if not counts:
        raise UserError(
            "\n".join([*(os.path.join(root, what) for what in empty.values()), f"put {wanted.plural} there"])
        )
    if ignored:
        listed = ", ".join(_shown(path[cut:]) for path in ignored[:LISTED])
        more = ", ..." if len(ignored) > LISTED else ""
        warnings.append(f"{len(ignored)} files that are no {wanted.plural} of a class are ignored: {listed}{more}")
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    split = Split(items=Paths(items), labels=labels, names=[_shown(path[cut:]) for path in items], root=root)
    return ClassFolders(split=split, classes=list(counts), empty=empty)


def _extension(name: str) -> str:
    """Lower case, with the dot; of a name without one, the last letter, which is no extension."""
    return name[name.rfind(".") :].lower()


def _shown(path: str) -> str:
    """A path as names have it: with slashes, and in Unicode's NFC."""
    path = path if os.sep == "/" else path.replace(os.sep, "/")
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def read_groups(root: Path, column: str) -> dict[str, str]:
    """Path of a file relative to root -> value of a column of ROOT/groups.csv.

    Raises:
        UserError: no such file or column, an empty value, or two rows that disagree.
    """
    file = root / GROUPS_FILE
    if not file.is_file():
        raise UserError(
            f"cv.group={column} needs {file}: a table with the columns path and {column}, a row for each file"
        )
    groups: dict[str, str] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            columns = list(rows.fieldnames or [])
            if "path" not in columns:
                raise UserError(f"{file} has no column 'path' (paths relative to {root}); {near('path', columns)}")
            if column not in columns:
                others = [name for name in columns if name != "path"]
                raise UserError(f"cv.group={column}: {file} has no such column; {near(column, others)}")
            for row in rows:
                path = unicodedata.normalize("NFC", (row["path"] or "").strip().removeprefix("./"))
                value = (row[column] or "").strip()
                if not path or not value:
                    empty = "path" if not path else column
                    raise UserError(f"{file}, row {rows.line_num}: column {empty} is empty")
                if groups.setdefault(path, value) != value:
                    raise UserError(
                        f"{file}, row {rows.line_num}: {path} is in group {value!r} and in {groups[path]!r}"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a CSV table in UTF-8: {error}") from None
    return groups


def groups_of(names: list[str], groups: dict[str, str], root: Path) -> np.ndarray:
    """The group of each file, (N,) of str.

    Raises:
        UserError: files without a row.
    """
    missing = [name for name in names if name not in groups]
    if missing:
        listed = ", ".join(missing[:LISTED]) + (", ..." if len(missing) > LISTED else "")
        raise UserError(f"{root / GROUPS_FILE} has no row for {len(missing)} of {len(names)} files: {listed}")
    return np.array([groups[name] for name in names], dtype=object)

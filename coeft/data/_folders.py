"""Finding images or sounds in folders."""

import csv
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coeft.data._decode import extensions
from coeft.data._source import Split
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

    files: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)
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


def files_below(folder: Path, wanted: Wanted = IMAGES) -> Found:
    """All files below a folder, through symbolic links too.

    Raises:
        UserError: a folder cannot be read.
    """
    known, found = wanted.extensions(), Found()
    above: set[str] = set()

    def walk(here: Path) -> None:
        real = os.path.realpath(here)
        if real in above:  # a link to a folder that it lies in
            return
        above.add(real)
        for path in visible(here):
            if path.is_dir():
                walk(path)
            elif path.suffix.lower() in known:
                found.files.append(path)
            else:
                found.other.append(path)
        above.remove(real)

    walk(folder)
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
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{given}: no such file or folder")
    if not files:
        raise UserError(f"no input: give {wanted.noun} files or folders")
    return Split(items=files, labels=np.full(len(files), -1, np.int64), names=[str(path) for path in files])


def class_folders(folder: Path) -> dict[str, Path]:
    """Class name -> its folder, sorted by name. Names are in Unicode's NFC, which file systems differ in.

    Raises:
        UserError: two folders have the same name then.
    """
    classes: dict[str, Path] = {}
    for path in visible(folder):
        if not path.is_dir():
            continue
        name = unicodedata.normalize("NFC", path.name)
        if name in classes:
            raise UserError(
                f"{folder} has two class folders called {name!r} that differ in their Unicode form; join them"
            )
        classes[name] = path
    return dict(sorted(classes.items()))


def read_split(root: Path, folder: Path, warnings: list[str], wanted: Wanted = IMAGES) -> tuple[Split, list[str]]:
    """The files of FOLDER/CLASS/..., and the class names; labels are their positions.

    Raises:
        UserError: there is no class folder, or one without files that are wanted.
    """
    classes = class_folders(folder)
    known = wanted.extensions()
    if not classes:
        loose = len([path for path in visible(folder) if path.suffix.lower() in known])
        has = f"has {loose} {wanted.plural} but no class folder" if loose else "has no class folder"
        raise UserError(f"{folder} {has}; expected {folder.name}/CLASS/{wanted.example}")
    items: list[Path] = []
    labels: list[int] = []
    problems: list[str] = []
    ignored: list[Path] = [path for path in visible(folder) if path.is_file() and path.suffix.lower() in known]
    for label, path in enumerate(classes.values()):
        found = files_below(path, wanted)
        if not found.files:
            has = f"only {found.other[0].name}" if len(found.other) == 1 else f"{len(found.other)} other files"
            problems.append(f"{path}: the class folder has no {wanted.noun} ({has if found.other else 'it is empty'})")
        items += found.files
        labels += [label] * len(found.files)
        ignored += found.other
    if problems:
        raise UserError("\n".join([*problems, f"put {wanted.plural} there, or remove the folder"]))
    if ignored:
        listed = ", ".join(path.relative_to(root).as_posix() for path in ignored[:LISTED])
        more = ", ..." if len(ignored) > LISTED else ""
        warnings.append(f"{len(ignored)} files that are no {wanted.plural} of a class are ignored: {listed}{more}")
    names = [unicodedata.normalize("NFC", path.relative_to(root).as_posix()) for path in items]
    return Split(items=items, labels=np.array(labels, np.int64), names=names), list(classes)


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

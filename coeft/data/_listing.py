"""What folders hold, and hashes of files, remembered between runs, so that a million files are not read twice.

A folder is not listed again while its times are those of when it was listed; a file is not hashed again while its size
and times are those of when it was hashed. Times that were younger than two seconds at that moment are not relied on: a
second change within the same tick of the clock would not show. Folders of file systems that may not keep the time of a
folder's last change (FUSE and other mounts of foreign storage) are listed each time.

CACHE/listings/KEY.npz and CACHE/hashes/KEY.npz belong to one data folder each and are replaced as a whole. Losing one
costs time, nothing else.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coeft.data._entries import cache_dir
from coeft.errors import UserError

FORMAT = 1  # raised when the files' layout changes
SETTLED = 2 * 10**9  # nanoseconds after which a time is relied on
WORTH_FILES, WORTH_BYTES = 1000, 64 << 20  # of what is listed or hashed; less is not worth a file
MOST = 4_000_000  # files whose hashes stay though they were not asked for this time
CHUNK = 1000  # files that a thread looks at in one go
# Linux: file systems that keep the time of a folder's last change; elsewhere all do that are in use.
KEEP_TIMES = set(
    "ext2 ext3 ext4 xfs btrfs zfs f2fs bcachefs jfs tmpfs ramfs overlay squashfs erofs iso9660 nfs nfs4 lustre gpfs "
    "beegfs ceph ocfs2 gfs2".split()
)
FILE, FOLDER, LINK = b"fdl"  # links may lead elsewhere tomorrow: they are followed each time


@dataclass(frozen=True)
class Held:
    """What one folder holds, hidden names left out."""

    state: tuple[int, int, int, int]
    """Device, inode, times of the last change of the contents and of the folder itself in ns."""
    listed: int
    """When, in ns."""
    names: list[str]
    """Sorted."""
    kinds: bytes
    """FILE, FOLDER or LINK for each name."""


class Listing:
    """The folders below a root, from what is remembered where that still holds.

    Args:
        root: the data's folder; None remembers nothing.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = "" if root is None else str(root)
        self._file = None if root is None else cache_dir() / "listings" / f"{_key(root)}.npz"
        self._known = {} if self._file is None else _read_folders(self._file)
        self._seen: dict[str, Held] = {}
        self._relied_on: dict[int, bool] = {}
        self.listed = 0
        """Folders that had to be listed."""

    def held(self, folder: str) -> Held:
        """What a folder holds.

        Raises:
            UserError: it cannot be read.
        """
        now = time.time_ns()
        try:
            stat = os.stat(folder)
            state = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
            known = self._known.get(folder.removeprefix(self._root))
            if known is None or known.state != state or not self._holds(known, folder):
                self.listed += 1
                with os.scandir(folder) as found:
                    entries = sorted((entry.name, _kind(entry)) for entry in found if not entry.name.startswith("."))
                kinds = bytes(kind for _, kind in entries)
                known = Held(state=state, listed=now, names=[name for name, _ in entries], kinds=kinds)
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from None
        self._seen[folder] = known
        return known

    def _holds(self, known: Held, folder: str) -> bool:
        """Whether a folder with the same times has the same names."""
        if known.listed - max(known.state[2:]) < SETTLED:
            return False
        device = known.state[0]
        if device not in self._relied_on:
            self._relied_on[device] = keeps_times(folder)
        return self._relied_on[device]

    def entries(self, folder: str) -> Iterator[tuple[str, str, bool]]:
        """Path, name and whether it is a folder (or a link to one), sorted by name.

        Raises:
            UserError: the folder cannot be read.
        """
        held, begin = self.held(folder), os.path.join(folder, "")
        for name, kind in zip(held.names, held.kinds, strict=True):
            path = begin + name
            yield path, name, kind == FOLDER or (kind == LINK and os.path.isdir(path))

    def save(self) -> None:
        """Remember what was seen, if anything of it is new and it is worth a file."""
        count = sum(len(held.names) for held in self._seen.values())
        if self._file is not None and self.listed and count >= WORTH_FILES:
            helds = list(self._seen.values())
            arrays = {
                "folders": _packed([folder.removeprefix(self._root) for folder in self._seen]),
                "states": np.array([[*held.state, held.listed, len(held.names)] for held in helds], np.int64),
                "names": _packed([name for held in helds for name in held.names]),
                "kinds": np.frombuffer(b"".join(held.kinds for held in helds), np.uint8),
            }
            _replace(self._file, arrays)


def _kind(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return LINK
    return FOLDER if entry.is_dir(follow_symlinks=False) else FILE


def _read_folders(file: Path) -> dict[str, Held]:
    """What a file remembers; nothing if it is absent or damaged."""
    arrays = _load(file)
    try:
        folders, names = _unpacked(arrays["folders"]), _unpacked(arrays["names"])
        kinds, states = arrays["kinds"].tobytes(), arrays["states"].tolist()
    except KeyError:
        return {}
    known, start = {}, 0
    for folder, (*state, listed, count) in zip(folders, states, strict=False):
        stop = start + count
        known[folder] = Held(state=tuple(state), listed=listed, names=names[start:stop], kinds=kinds[start:stop])
        start = stop
    return known


def keeps_times(folder: str) -> bool:
    """Whether the file system of a folder is known to keep the time of a folder's last change."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return True  # not Linux
    real = os.path.realpath(folder)
    best, kind = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of equal ones the later mount lies on top
            best, kind = point, after.split()[0]
    return kind in KEEP_TIMES


# Hashes of files


def file_states(paths: Sequence[str]) -> np.ndarray:
    """int64 (N, 4): size, times of the last change of contents and of the file in ns, inode; -1 where there is none."""

    def look(chunk: Sequence[str]) -> list[tuple[int, int, int, int]]:
        return [_file_state(path) for path in chunk]

    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(max_workers=8) as pool:  # which a network's file system answers at once
        found = [state for states in pool.map(look, chunks) for state in states]
    return np.array(found, np.int64).reshape(-1, 4)


def _file_state(path: str) -> tuple[int, int, int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class Hashes:
    """Hashes of files below a folder, from what is remembered where that still holds.

    Args:
        root: the data's folder; None remembers nothing.
        width: bytes of a hash.
    """

    def __init__(self, root: Path | None, width: int) -> None:
        self._file = None if root is None else cache_dir() / "hashes" / f"{_key(root)}.npz"
        self._root = "" if root is None else os.path.join(root, "")
        self._names, self._states, self._digests = _read_hashes(self._file, width)

    def known(self, paths: Sequence[str], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes, uint8 (N, width), and which of them are known, bool (N,).

        Args:
            paths: absolute, or as they were given before.
            states: as `file_states` gives them.
        """
        digests = np.zeros((len(paths), self._digests.shape[1]), np.uint8)
        there = np.zeros(len(paths), bool)
        if self._names:
            where = {name: row for row, name in enumerate(self._names)}
            rows = np.array([where.get(self._short(path), -1) for path in paths], np.int64)
            there = rows >= 0
            there[there] = (self._states[rows[there], :4] == states[there]).all(1)
            # A file may have changed again within the tick of the clock in which it was hashed.
            settled = self._states[:, 4] - self._states[:, 1:3].max(1) >= SETTLED
            there[there] = settled[rows[there]]
            digests[there] = self._digests[rows[there]]
        return digests, there

    def add(self, paths: Sequence[str], states: np.ndarray, digests: np.ndarray, new: np.ndarray, begun: int) -> None:
        """Remember hashes, if those that are new are worth it.

        Args:
            new: bool (N,), which of them were just made.
            begun: when that began, in ns; `states` were looked at later.
        """
        if self._file is None or not (new.sum() >= WORTH_FILES or states[new, 0].sum() >= WORTH_BYTES):
            return
        good = np.flatnonzero(states[:, 0] >= 0)
        added = [self._short(paths[row]) for row in good.tolist()]
        again = set(added)
        kept = [row for row, name in enumerate(self._names) if name not in again]
        kept = kept[:MOST]  # of another split or choice of files, or gone
        stamped = np.concatenate([states[good], np.full((len(added), 1), begun, np.int64)], 1)
        arrays = {
            "names": _packed([*added, *(self._names[row] for row in kept)]),
            "states": np.concatenate([stamped, self._states[kept]]),
            "digests": np.concatenate([digests[good], self._digests[kept]]),
        }
        _replace(self._file, arrays)

    def _short(self, path: str) -> str:
        return path[len(self._root) :] if path.startswith(self._root) else os.path.abspath(path)


def _read_hashes(file: Path | None, width: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, states with the time of hashing (N, 5), hashes (N, width); empty if the file is absent or damaged."""
    arrays = {} if file is None else _load(file)
    if {"names", "states", "digests"} <= set(arrays):
        names, states, digests = _unpacked(arrays["names"]), arrays["states"], arrays["digests"]
        if states.shape == (len(names), 5) and digests.shape == (len(names), width):
            return names, states, digests
    return [], np.zeros((0, 5), np.int64), np.zeros((0, width), np.uint8)


# Files of the two


def _key(root: Path) -> str:
    return hashlib.blake2b(os.fsencode(os.path.abspath(root)), digest_size=16).hexdigest()


def _packed(texts: Sequence[str]) -> np.ndarray:
    """Texts as one array of bytes; none of them holds a zero, as no file's name does."""
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(array: np.ndarray) -> list[str]:
    return array.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


def _load(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, whose check sums are compared; none if it is absent, damaged or of another format."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if found.pop("format").tolist() != FORMAT:
            return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    with contextlib.suppress(OSError):
        os.utime(file)  # last used now
    return found


def _replace(file: Path, arrays: dict[str, Any]) -> None:
    """Write a file under another name and rename it; nothing where the cache cannot be written."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.stem}.", delete=False) as stream:
            temporary = stream.name
            np.savez(stream, format=np.int64(FORMAT), **arrays)
        os.replace(temporary, file)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)

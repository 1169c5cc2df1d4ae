"""Decoded, resized pixels on disk: decoded once, then read by many processes as a memory map.

An entry is a folder CACHE/images/KEY with pixels.npy (uint8 (N, C, H, W)), checks.npy (uint32 (N,), CRC-32 of each
image) and meta.json. The key hashes the images' contents, the preprocessing and Pillow's version. An entry is written
under another name and renamed, so it is whole or absent; one that does not pass its checks is built again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from coeft.backbones._backbone import Preprocessing
from coeft.data._decode import pixels, strict_pillow
from coeft.data._part import Batch, Encoded, Progress
from coeft.data._source import Split, default_threads, over_threads
from coeft.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes may then decode the same images at once, which only costs time
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # raised when decoding changes, so that old entries are not found
IN_MEMORY = 32 << 20  # bytes; arrays (not files) that stay below it are not worth a file
CHECKED = 2 << 30  # bytes of an entry whose check sums are compared when it is opened
LISTED_ERRORS = 10  # unreadable images that one error message names


@dataclass
class MappedPixels:
    """Pixels of a cache entry; every process maps the file itself, and a copy sent to a worker holds only the path."""

    path: Path
    shape: tuple[int, ...]
    _map: np.ndarray | None = field(default=None, repr=False)

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """A copy of these images, uint8 (len(rows), C, H, W)."""
        if self._map is None:
            self._map = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._map[rows]

    def batch(self, fetched: np.ndarray) -> Batch:
        """pixel_values, uint8 (B, C, H, W)."""
        return {"pixel_values": torch.from_numpy(fetched)}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shape": self.shape, "_map": None}


@dataclass
class HeldPixels:
    """Pixels in memory, uint8 (N, C, H, W)."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """A copy of these images, uint8 (len(rows), C, H, W)."""
        return self.array[rows]

    def batch(self, fetched: np.ndarray) -> Batch:
        """pixel_values, uint8 (B, C, H, W)."""
        return {"pixel_values": torch.from_numpy(fetched)}


Pixels = MappedPixels | HeldPixels


def cache_dir() -> Path:
    """Folder of the cache: $COEFT_CACHE, else coeft/ in the user's cache folder."""
    if chosen := os.environ.get("COEFT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "coeft"


def cache_info() -> dict[str, Any]:
    """{"folder", "files", "bytes", "entries": [{"key", "images", "bytes", "made_from"}, ...]}."""
    entries = []
    for meta in sorted((cache_dir() / "images").glob("*/meta.json")):
        try:
            facts = json.loads(meta.read_text(encoding="utf-8"))
            images, origin = facts["shape"][0], facts["made_from"]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            images, origin = None, "damaged"
        entries.append(
            {"key": meta.parent.name, "images": images, "bytes": _count(meta.parent)[1], "made_from": origin}
        )
    files, size = _count(cache_dir() / "images")
    return {"folder": str(cache_dir()), "files": files, "bytes": size, "entries": entries}


def clear_cache() -> tuple[int, int]:
    """Delete all entries; gives the number of files and of bytes. A running training keeps what it has mapped."""
    folder = cache_dir() / "images"
    freed = _count(folder)
    if folder.is_dir():
        shutil.rmtree(folder)
    return freed


def _count(folder: Path) -> tuple[int, int]:
    """Files below a folder and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return len(sizes), sum(sizes)


def decode(
    split: Split,
    preprocessing: Preprocessing,
    *,
    made_from: str,
    on_error: str = "raise",
    threads: int = 0,
    keep: bool = True,
    progress: Progress = lambda done, total: None,
) -> Encoded:
    """Pixels of a split from the cache, or decoded and, if `keep`, put there.

    Args:
        made_from: a word for people, shown by `coeft cache`.
        on_error: raise or skip.
        threads: for decoding; 0 is the machine's cores, at most 8.
        progress: called with the images done and their number.

    Raises:
        UserError: an image cannot be read (on_error=raise), or the cache cannot be written.
    """
    shape = (len(split), len(preprocessing.mean), *preprocessing.image_size)
    if not keep or (isinstance(split.items, np.ndarray) and int(np.prod(shape)) <= IN_MEMORY):
        array = np.zeros(shape, np.uint8)

        def hold(row: int, image: np.ndarray) -> None:
            array[row] = image

        bad = _decode_rows(split, preprocessing, hold, on_error, threads, progress)
        return _decoded(HeldPixels(array), bad)

    key = _key(split, preprocessing)
    entry = cache_dir() / "images" / key
    if (found := _open(entry, shape)) is None:
        with _locked(entry):
            if (found := _open(entry, shape)) is None:  # another process may have made it meanwhile
                found = _build(entry, split, preprocessing, shape, made_from, on_error, threads, progress)
    bad = found[1]
    if bad and on_error == "raise":
        raise UserError(_unreadable(split, bad, complete=True))
    return _decoded(found[0], bad)


def _decoded(store: Pixels, bad: dict[int, str]) -> Encoded:
    good = np.setdiff1d(np.arange(store.shape[0], dtype=np.int64), np.array(sorted(bad), np.int64))
    return Encoded(store=store, good=good, bad=bad)


def _key(split: Split, preprocessing: Preprocessing) -> str:
    """32 hexadecimal digits for the contents, in order, and all that decides their pixels."""
    digest = hashlib.blake2b(digest_size=16)
    shape = (len(preprocessing.mean), *preprocessing.image_size)
    crop = preprocessing.crop_pct if preprocessing.resize == "crop" else None
    facts = (FORMAT, PIL.__version__, shape, preprocessing.interpolation, crop, preprocessing.resize)
    digest.update(repr(facts).encode())
    digest.update(split.digests.tobytes())
    return digest.hexdigest()


def _decode_rows(
    split: Split,
    preprocessing: Preprocessing,
    store: Callable[[int, np.ndarray], None],
    on_error: str,
    threads: int,
    progress: Progress,
    after: Callable[[int], None] = lambda done: None,
) -> dict[int, str]:
    """store(row, pixels) for every readable image; gives row -> reason for the others."""
    bad: dict[int, str] = {}
    total = len(split)

    def work(row: int, item: Any) -> None:
        try:
            image = pixels(item, preprocessing)
        except ValueError as error:
            bad[row] = str(error)
            return
        store(row, image)

    def chunk_done(done: int) -> None:
        if on_error == "raise" and len(bad) >= LISTED_ERRORS:
            raise UserError(_unreadable(split, bad, complete=False))
        after(done)
        progress(done, total)

    with strict_pillow():
        over_threads(work, split.items, threads=threads or default_threads(), after=chunk_done)
    if bad and on_error == "raise":
        raise UserError(_unreadable(split, bad, complete=True))
    return dict(sorted(bad.items()))


def _unreadable(split: Split, bad: dict[int, str], *, complete: bool) -> str:
    lines = [f"  {split.names[row]}: {bad[row]}" for row in sorted(bad)[:LISTED_ERRORS]]
    if len(bad) > LISTED_ERRORS and complete:
        lines.append(f"  and {len(bad) - LISTED_ERRORS} more")
    count = f"{len(bad)}" if complete else f"at least {len(bad)}"
    what = "image cannot be read" if count == "1" else "images cannot be read"
    return "\n".join([f"{count} {what}; repair or remove, or set data.on_error=skip to go on without:", *lines])


def _build(
    entry: Path,
    split: Split,
    preprocessing: Preprocessing,
    shape: tuple[int, ...],
    made_from: str,
    on_error: str,
    threads: int,
    progress: Progress,
) -> tuple[MappedPixels, dict[int, str]]:
    """Decode into a folder of another name, rename it, open it."""
    needed = int(np.prod(shape))
    free = shutil.disk_usage(entry.parent).free
    if needed > free:
        raise UserError(
            f"the image cache {cache_dir()} needs {needed / 1e6:,.0f} MB and has {free / 1e6:,.0f} MB free; make room "
            "(`coeft cache clear`), or set COEFT_CACHE to a folder with more"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        checks = np.zeros(shape[0], np.uint32)
        waiting: dict[int, np.ndarray] = {}
        blank = np.zeros(shape[1:], np.uint8).tobytes()
        # Written row after row, not through a map: a full disk is then an error, not a killed process.
        with open(folder / "pixels.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0

            def flush(done: int) -> None:
                nonlocal written
                for row in range(written, done):
                    image = waiting.pop(row, None)
                    data = blank if image is None else image.tobytes()
                    checks[row] = zlib.crc32(data)
                    file.write(data)
                written = done

            bad = _decode_rows(split, preprocessing, waiting.__setitem__, on_error, threads, progress, flush)
        np.save(folder / "checks.npy", checks)
        meta = {"format": FORMAT, "shape": list(shape), "bad": {str(k): v for k, v in bad.items()}}
        meta["made_from"] = made_from
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if entry.exists():  # damaged, or made meanwhile on a system without locks
            shutil.rmtree(entry, ignore_errors=True)
        try:
            os.rename(folder, entry)
        except OSError:
            if not entry.is_dir():
                raise
    except OSError as error:
        raise UserError(f"the image cache {cache_dir()} cannot be written: {error}; set COEFT_CACHE=FOLDER") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = _open(entry, shape)
    if found is None:
        raise UserError(
            f"the image cache {cache_dir()} gives back other bytes than were written; set COEFT_CACHE=FOLDER"
        )
    return found


def _open(entry: Path, shape: tuple[int, ...]) -> tuple[MappedPixels, dict[int, str]] | None:
    """The entry, or None if it is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        array = np.load(entry / "pixels.npy", mmap_mode="r", allow_pickle=False)
        checks = np.load(entry / "checks.npy", allow_pickle=False)
        bad = {int(row): str(reason) for row, reason in meta["bad"].items()}
        if array.shape != shape or array.dtype != np.uint8 or checks.shape != shape[:1]:
            return None
        # All rows, or rows spread evenly over an entry that would take long to read.
        step = max(1, array.nbytes // CHECKED)
        for row in range(0, shape[0], step):
            if zlib.crc32(array[row]) != checks[row]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    return MappedPixels(entry / "pixels.npy", shape), bad


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Only one process at a time builds an entry.

    Raises:
        UserError: the cache folder cannot be written.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = open(entry.parent / f".{entry.name}.lock", "w")
    except OSError as error:
        raise UserError(f"the image cache {cache_dir()} cannot be written: {error}; set COEFT_CACHE=FOLDER") from error
    with lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

"""The bound of the cache: what was used last goes last, and what a process has open stays.

A process that opens an entry holds a shared lock on .KEY.lease beside it for as long as the entry is in use; whoever
makes room takes that lock alone, or leaves the entry where it is. An entry that is being built counts with the bytes
that it will need, which stand in its folder's file `needed`.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coeft.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: open files cannot be deleted there, which protects them
    fcntl = None  # type: ignore[assignment]

VARIABLE = "COEFT_CACHE_SIZE"
DEFAULT = "100GB"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
NEEDED = "needed"


@dataclass(frozen=True)
class Kept:
    """An entry, or a single file."""

    path: Path
    size: int
    """Bytes."""
    used: float
    """When it was used last, in seconds of the epoch."""


def cache_limit() -> int:
    """Bytes that the cache may have: $COEFT_CACHE_SIZE, such as 20GB or 500MiB.

    Raises:
        UserError: it is no size.
    """
    text = os.environ.get(VARIABLE) or DEFAULT
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise UserError(f"{VARIABLE}={text} is no size; give it as 20GB, 500MiB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])


def size_of(folder: Path) -> tuple[int, int]:
    """Files below a folder and their bytes."""
    files, size = 0, 0
    for path in folder.rglob("*") if folder.is_dir() else []:
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.is_file():
                files, size = files + 1, size + path.stat().st_size
    return files, size


def kept(cache: Path) -> list[Kept]:
    """All entries and single files, the least recently used first."""
    found = []
    for path in cache.glob("*/*"):
        if path.name.startswith("."):
            continue
        with contextlib.suppress(OSError):
            if path.is_dir():
                meta = path / "meta.json"
                used = (meta if meta.exists() else path).stat().st_mtime
                found.append(Kept(path, size_of(path)[1], used))
            else:
                found.append(Kept(path, path.stat().st_size, path.stat().st_mtime))
    return sorted(found, key=lambda each: (each.used, str(each.path)))


def lease(entry: Path) -> IO[bytes] | None:
    """A file that keeps an entry in the cache while it is open; None where there can be none."""
    try:
        file = open(_beside(entry, "lease"), "ab")  # noqa: SIM115 (it stays open)
    except OSError:  # no such folder yet, or it cannot be written; then nobody can delete there either
        return None
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def used_now(entry: Path) -> None:
    """Note that an entry was used."""
    with contextlib.suppress(OSError):
        os.utime(entry / "meta.json")


def make_room(cache: Path, entry: Path, needed: int, what: str) -> Path:
    """A folder beside an entry, to be filled and renamed, and room for it.

    Args:
        needed: bytes; 0 if they are not known.
        what: what a message calls the cache.

    Raises:
        UserError: what could go is not enough.
        OSError: the cache cannot be written.
    """
    limit = cache_limit()
    with _alone(cache):
        over = _total(cache) + needed - limit
        short = needed - shutil.disk_usage(entry.parent).free
        over, short = _evict(cache, over, short)
        if over > 0:
            raise UserError(_too_large(what, cache, needed, limit))
        if short > 0:
            raise UserError(
                f"the {what} {cache} needs {needed / 1e6:,.0f} MB and has {(needed - short) / 1e6:,.0f} MB "
                "free; make room (`coeft cache clear`), or set COEFT_CACHE to a folder with more"
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
        try:
            (folder / NEEDED).write_text(str(needed))
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def take_in(cache: Path, folder: Path, entry: Path) -> None:
    """Rename a filled folder of `make_room` to its entry, while nobody counts: it would be counted as neither.

    Raises:
        OSError: the cache cannot be written.
    """
    with _alone(cache):
        if entry.exists():  # damaged, or made meanwhile on a system without locks
            shutil.rmtree(entry, ignore_errors=True)
        try:
            os.rename(folder, entry)
        except OSError:
            if not entry.is_dir():
                raise
        (entry / NEEDED).unlink(missing_ok=True)


def shrink(cache: Path) -> None:
    """Bring the cache below its limit as far as nothing in use has to go: after an entry whose size was not known."""
    with _alone(cache):
        _evict(cache, _total(cache) - cache_limit(), 0)


def _too_large(what: str, cache: Path, needed: int, limit: int) -> str:
    return (
        f"the {what} {cache} may have {limit / 1e6:,.0f} MB ({VARIABLE}), this data needs {needed / 1e6:,.0f} MB, and "
        f"what is in use cannot go: set {VARIABLE} to more, such as {VARIABLE}={max(1, round(2 * needed / 1e9))}GB"
    )


def _evict(cache: Path, over: int, short: int) -> tuple[int, int]:
    """Delete what was not used longest until neither number of bytes is above 0, or nothing can go; what is left."""
    for each in kept(cache) if over > 0 or short > 0 else []:
        if over <= 0 and short <= 0:
            break
        if _delete(each.path):
            over, short = over - each.size, short - each.size
    return over, short


def _delete(path: Path) -> bool:
    """Delete an entry or a file that nobody uses."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    with open(_beside(path, "lease"), "ab") as file:
        if fcntl is not None and not _taken(file):
            return False
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _total(cache: Path) -> int:
    """Bytes of all that is there and of what is being built; what a dead process was building goes."""
    total = sum(each.size for each in kept(cache))
    for note in cache.glob(f"*/.*/{NEEDED}"):
        folder = note.parent
        key = folder.name[1:].partition(".")[0]
        if _is_built(folder.parent / key):
            with contextlib.suppress(OSError, ValueError):
                total += max(int(note.read_text()), size_of(folder)[1])
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return total


def _is_built(entry: Path) -> bool:
    """Whether a process is building an entry: it holds the entry's lock."""
    built = True
    if fcntl is not None:
        with open(_beside(entry, "lock"), "ab") as file:
            built = not _taken(file)
    return built


def _taken(file: IO[bytes]) -> bool:
    """Whether this process got the lock on a file for itself alone, without waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _beside(entry: Path, suffix: str) -> Path:
    return entry.parent / f".{entry.name}.{suffix}"


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Only one process at a time counts and makes room."""
    with open(cache / ".limit.lock", "ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

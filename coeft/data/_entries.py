"""Entries of the cache on disk: prepared once, then read by many processes as memory maps.

An entry is a folder CACHE/KIND/KEY, where KIND is images, tokens, waveforms or spectrograms. It is written under
another name and renamed, so it is whole or absent; one that does not pass its checks is built again; only one process
at a time builds it.
"""

import contextlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from coeft.data._limit import cache_limit, lease, make_room, shrink, size_of, take_in, used_now
from coeft.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes may then build the same entry at once, which only costs time
    fcntl = None  # type: ignore[assignment]

# folder -> what a message calls it
WHAT = {
    "images": "image cache",
    "tokens": "token cache",
    "waveforms": "waveform cache",
    "spectrograms": "spectrogram cache",
}
REMEMBERED = ("listings", "hashes", "sheets")  # folders of single files, see _listing.py and dry_run.py
CHECKED = 2 << 30  # bytes of an entry whose check sums are compared when it is opened

Store = TypeVar("Store")
Rest = TypeVar("Rest")


def cache_dir() -> Path:
    """Folder of the cache: $COEFT_CACHE, else coeft/ in the user's cache folder."""
    if chosen := os.environ.get("COEFT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "coeft"


def cache_info() -> dict[str, Any]:
    """{"folder", "files", "bytes", "limit", "entries": [...]}.

    An entry is {"key", "kind", "samples", "bytes", "made_from", "used"}; `used` is when it was used last, in seconds of
    the epoch. They are in that order, the latest first.

    Raises:
        UserError: COEFT_CACHE_SIZE is no size.
    """
    entries = []
    for kind in WHAT:
        for meta in (cache_dir() / kind).glob("*/meta.json"):
            try:
                facts = json.loads(meta.read_text(encoding="utf-8"))
                samples, origin = int(facts["samples"]), facts["made_from"]
            except (OSError, ValueError, KeyError, TypeError):
                samples, origin = None, "damaged"
            with contextlib.suppress(OSError):  # gone meanwhile
                entry = {"key": meta.parent.name, "kind": kind, "samples": samples, "made_from": origin}
                entries.append(entry | {"bytes": size_of(meta.parent)[1], "used": meta.stat().st_mtime})
    counts = [size_of(cache_dir() / kind) for kind in (*WHAT, *REMEMBERED)]
    return {
        "folder": str(cache_dir()),
        "files": sum(files for files, _ in counts),
        "bytes": sum(size for _, size in counts),
        "limit": cache_limit(),
        "entries": sorted(entries, key=lambda entry: (-entry["used"], entry["key"])),
    }


def clear_cache() -> tuple[int, int]:
    """Delete all entries; gives the number of files and of bytes. A running training keeps what it has mapped."""
    files, size = 0, 0
    for kind in (*WHAT, *REMEMBERED):
        folder = cache_dir() / kind
        freed = size_of(folder)
        files, size = files + freed[0], size + freed[1]
        if folder.is_dir():
            shutil.rmtree(folder)
    (cache_dir() / ".limit.lock").unlink(missing_ok=True)
    return files, size


def obtain(
    kind: str,
    key: str,
    open_entry: Callable[[Path], tuple[Store, Rest] | None],
    fill: Callable[[Path], dict[str, Any]],
    *,
    needed: int = 0,
) -> tuple[Store, Rest]:
    """An entry, opened; built first if it is absent or damaged.

    Args:
        kind: a key of WHAT.
        key: a name for all that decides the contents.
        open_entry: reads and checks the entry in a folder, gives a store of its samples and more; None is absent or
            damaged.
        fill: writes the files into an empty folder; gives the facts for meta.json, which is written last.
        needed: bytes that there must be room for before; 0 is not known.

    Raises:
        UserError: the cache cannot be written, or has too little room; and what `fill` raises.
    """
    entry = cache_dir() / kind / key
    with contextlib.ExitStack() as stack:
        use = lease(entry)
        if use is not None:
            stack.callback(use.close)
        found = open_entry(entry)
        if found is None:
            with _locked(entry):
                if use is None and (use := lease(entry)) is not None:  # there was no folder for it
                    stack.callback(use.close)
                found = open_entry(entry)  # another process may have made it meanwhile
                if found is None:
                    _build(entry, fill, needed)
                    found = open_entry(entry)
        if found is None:
            raise UserError(
                f"the {WHAT[kind]} {cache_dir()} gives back other bytes than were written; set COEFT_CACHE=FOLDER"
            )
        used_now(entry)
        weakref.finalize(found[0], stack.pop_all().close)  # nobody makes room with it while the store is held
    return found


def _build(entry: Path, fill: Callable[[Path], dict[str, Any]], needed: int) -> None:
    """Fill a folder of another name, rename it."""
    folder = None
    if fcntl is not None:  # nobody else builds this entry now, so what is there was left by a process that was killed
        for left in entry.parent.glob(f".{entry.name}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
    try:
        folder = make_room(cache_dir(), entry, needed, WHAT[entry.parent.name])
        meta = fill(folder)
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        take_in(cache_dir(), folder, entry)
        if not needed:
            shrink(cache_dir())
    except OSError as error:
        raise _unwritable(entry, error) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def gone(path: Path, error: Exception) -> UserError:
    """What a process says that needs a file of an entry and does not find it whole."""
    return UserError(
        f"{path} of the cache has gone or is damaged ({error}): was the cache cleared meanwhile? `coeft resume` builds "
        "it again"
    )


def _unwritable(entry: Path, error: OSError) -> UserError:
    return UserError(f"the {WHAT[entry.parent.name]} {cache_dir()} cannot be written: {error}; set COEFT_CACHE=FOLDER")


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
        raise _unwritable(entry, error) from error
    with lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

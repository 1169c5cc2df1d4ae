"""Samples as their source gives them: labels at hand, images not yet decoded, text not yet tokenised."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coeft.data._listing import Hashes, file_states
from coeft.errors import UserError

DIGEST_BYTES = 16
CHUNK = 256  # images read ahead of the threads that work on them
LISTED_ERRORS = 10  # unusable samples that one error message names


@dataclass(kw_only=True)
class Split:
    """Some samples of one source, in a fixed order."""

    items: Sequence[Path] | Sequence[bytes] | Sequence[dict[str, Any]] | np.ndarray
    """Files, encoded images, pixels (uint8 (N, H, W) or (N, H, W, C)), or the text of rows: column -> value."""
    labels: np.ndarray
    """As Part.labels: classes as int64 (N,) indices into the class names, numbers float32 (N,), ..."""
    names: Sequence[str]
    """What a message calls each sample; unique, relative to the data's folder."""
    groups: np.ndarray | None = None
    """(N,) values of the group column as text."""
    root: Path | None = None
    """Folder whose files' hashes are remembered between runs; None remembers none."""
    _states: np.ndarray = field(init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "Split":
        """The samples at these positions, in this order."""
        items = self.items[indices] if isinstance(self.items, np.ndarray) else Chosen(self.items, indices)
        return Split(
            items=items,
            labels=self.labels[indices],
            names=[self.names[i] for i in indices],
            groups=None if self.groups is None else self.groups[indices],
            root=self.root,
        )

    @cached_property
    def digests(self) -> np.ndarray:
        """uint8 (N, 16): a hash of the bytes of each file, of each array of pixels with its shape, or of each row."""
        if len(self) and isinstance(self.items[0], Path):
            return self._file_digests()
        digests = np.zeros((len(self), DIGEST_BYTES), np.uint8)

        def fill(start: int, item: Any) -> None:
            digests[start] = np.frombuffer(_digest(item), np.uint8)

        over_threads(fill, self.items, threads=default_threads())
        return digests

    def _file_digests(self) -> np.ndarray:
        """The same where the items are files, of which those that are remembered and have not changed are not read."""
        begun = time.time_ns()
        paths = file_names(self.items)
        self._states = file_states(paths)
        hashes = Hashes(self.root, DIGEST_BYTES)
        digests, known = hashes.known(paths, self._states)
        missing = np.flatnonzero(~known)

        def fill(start: int, path: str) -> None:
            digests[missing[start]] = np.frombuffer(_digest(Path(path)), np.uint8)

        over_threads(fill, [paths[row] for row in missing], threads=default_threads())
        hashes.add(paths, self._states, digests, ~known, begun)
        return digests

    def check_unchanged(self) -> None:
        """Compare sizes and times of files with those of when `digests` read them.

        Raises:
            UserError: names the files that were changed, or have gone.
        """
        if not len(self) or not isinstance(self.items[0], Path):
            return
        differs = (file_states(file_names(self.items))[:, :2] != self._states[:, :2]).any(1)
        changed = [self.names[index] for index in np.flatnonzero(differs).tolist()]
        if changed:
            more = f" and {len(changed) - LISTED_ERRORS} more" if len(changed) > LISTED_ERRORS else ""
            raise UserError(f"changed while it was read: {', '.join(changed[:LISTED_ERRORS])}{more}; start again")


@dataclass(frozen=True)
class Paths(Sequence):
    """Files, made into paths when they are asked for: a million of them take a second."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        return Path(self.texts[index])


def file_names(items: Any) -> list[str]:
    """Files as strings, without making paths of strings first where there are only strings."""
    if isinstance(items, Paths):
        return list(items.texts)
    if isinstance(items, Chosen) and isinstance(items.base, Paths):
        return [items.base.texts[row] for row in items.indices.tolist()]
    return [str(item) for item in items]


@dataclass(frozen=True)
class Chosen(Sequence):
    """Some items of a sequence, fetched when asked for."""

    base: Sequence
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.base[int(self.indices[index])]


@dataclass(kw_only=True)
class Source:
    """Everything a run may use of one data set."""

    train: Split
    val: Split | None = None
    test: Split | None = None
    class_names: list[str]
    warnings: list[str] = field(default_factory=list)
    """What the user should know, such as files that were left out."""
    skipped: list[str] = field(default_factory=list)
    """Samples that the source itself left out (data.on_error=skip): name and reason."""
    empty: list[str] = field(default_factory=list)
    """Class folders without a sample that were left out (data.on_error=skip), and why."""

    @property
    def splits(self) -> dict[str, Split | None]:
        """train, val, test -> samples or None."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all samples, labels and class names; the same on any machine."""
        return fingerprint(self.splits, self.class_names)


def fingerprint(splits: dict[str, Split | None], class_names: Sequence[str]) -> str:
    """32 hexadecimal digits that follow from contents, labels, groups, order and class names, not from paths."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(list(class_names)).encode())
    for part, split in splits.items():
        if split is None:
            continue
        digest.update(f"{part} {len(split)}".encode())
        digest.update(split.digests.tobytes())
        kind = "<i8" if split.labels.dtype == np.int64 else "<f4"
        digest.update(np.ascontiguousarray(split.labels, kind).tobytes())
        if split.groups is not None:
            digest.update(repr([str(group) for group in split.groups]).encode())
    return digest.hexdigest()


def _digest(item: Any) -> bytes:
    """A hash of 16 bytes of a file, of bytes, of an array or of a record."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if isinstance(item, np.ndarray):
        digest.update(repr(item.shape).encode())
        digest.update(np.ascontiguousarray(item).data)
    elif isinstance(item, bytes):
        digest.update(item)
    elif isinstance(item, dict):
        text = json.dumps(item, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(text.encode("utf-8", "surrogatepass"))
    else:
        try:
            with open(item, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:  # reading it again for its pixels reports this to the user
            digest.update(b"unreadable" + str(error.errno).encode())
    return digest.digest()


def default_threads() -> int:
    """Threads for work that leaves Python's lock: at most 8, at most the machine's cores."""
    return min(8, os.cpu_count() or 1)


def over_threads(
    work: Callable[[int, Any], None],
    items: Sequence[Any] | np.ndarray,
    *,
    threads: int,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """work(index, item) for every item; items are fetched here, in order, and `after(done)` follows each chunk.

    Fetching stays in one thread because lazily decoded sequences need not be safe in several.
    """
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for start in range(0, len(items), CHUNK):
            stop = min(start + CHUNK, len(items))
            futures = [pool.submit(work, index, items[index]) for index in range(start, stop)]
            for future in futures:
                future.result()
            after(stop)


def listed(one: str, many: str, problems: Sequence[str], *, complete: bool = True) -> str:
    """A message about samples that cannot be used, with the first of them.

    Args:
        one, many: what is said of one sample and of several.
        complete: whether all samples were looked at.
    """
    count = len(problems)
    lines = [f"  {problem}" for problem in problems[:LISTED_ERRORS]]
    if count > LISTED_ERRORS and complete:
        lines.append(f"  and {count - LISTED_ERRORS} more")
    head = f"{count} {one if count == 1 and complete else many}"
    head = f"{head}; repair or remove, or set data.on_error=skip to go on without:"
    if not complete:
        head = f"at least {head}"
    return "\n".join([head, *lines])

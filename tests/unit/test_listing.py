"""Folders and hashes that are remembered: quick where nothing changed, right where something did."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coeft.data import _listing
from coeft.data._folders import IMAGES, files_below, read_split
from coeft.data._listing import Listing, keeps_times
from coeft.data._source import Chosen, Paths, Split
from coeft.data.image_folder import ImageFolder
from coeft.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is worth remembering, and times count from the first moment."""
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_listing, "WORTH_FILES", 0)
    monkeypatch.setattr(_listing, "SETTLED", 0)
    monkeypatch.setattr(_listing, "keeps_times", lambda folder: True)  # whatever the tests run on
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files that are no images, which only their reading would show."""
    root = tmp_path / "my data ä"
    for name in ("train/a b/1.png", "train/a b/deep/2.png", "train/ü/3.png", "test/a b/4.png", "test/ü/5.png"):
        write(root / name, name)
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    tick()
    return path


def tick() -> None:
    """Wait until the file system's clock has gone on."""
    time.sleep(0.02)


def loaded(root: Path) -> dict[str, bytes]:
    """Name -> hash of all samples, as a run loads them."""
    source = ImageFolder(root=str(root)).load(0)
    splits = [split for split in source.splits.values() if split is not None]
    return {name: bytes(digest) for split in splits for name, digest in zip(split.names, split.digests, strict=True)}


def fresh(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The same with nothing remembered."""
    with monkeypatch.context() as patch:
        patch.setenv("COEFT_CACHE", str(root.parent / f"none {time.time_ns()}"))
        return loaded(root)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Folders that are listed and files that are read, as it happens."""
    done: dict[str, list[str]] = {"listed": [], "read": []}
    scandir, digest = os.scandir, _source_digest()

    def listed(path: Any) -> Any:
        done["listed"].append(str(path))
        return scandir(path)

    def read(item: Any) -> bytes:
        done["read"].append(str(item))
        return digest(item)

    monkeypatch.setattr(_listing.os, "scandir", listed)
    monkeypatch.setattr("coeft.data._source._digest", read)
    return done


def _source_digest() -> Any:
    from coeft.data import _source

    return _source._digest


def test_nothing_is_listed_or_read_twice(root: Path, work: dict[str, list[str]]) -> None:
    first = loaded(root)
    assert len(first) == 5 and len(work["read"]) == 5 and work["listed"]
    work["listed"].clear()
    work["read"].clear()
    assert loaded(root) == first
    assert work == {"listed": [], "read": []}


CHANGES = {
    "added": lambda root: write(root / "train" / "ü" / "new.png", "new"),
    "added deep below": lambda root: write(root / "train" / "a b" / "deep" / "new.png", "new"),
    "a folder added": lambda root: write(root / "train" / "ü" / "more" / "new.png", "new"),
    "removed": lambda root: (root / "train" / "a b" / "deep" / "2.png").unlink(),
    "a folder removed": lambda root: shutil.rmtree(root / "train" / "a b" / "deep"),
    "renamed": lambda root: (root / "test" / "ü" / "5.png").rename(root / "test" / "ü" / "6.png"),
    "moved": lambda root: (
        (root / "train" / "ü" / "3.png").replace(root / "train" / "a b" / "1.png")
        and write(root / "train" / "ü" / "x.png", "x")
    ),
    "hidden": lambda root: (root / "train" / "a b" / "1.png").rename(root / "train" / "a b" / ".1.png"),
    "changed": lambda root: write(root / "train" / "a b" / "1.png", "longer than before, far longer"),
    "changed to the same size": lambda root: write(root / "train" / "a b" / "1.png", "TRAIN/A B/1.PNG"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = loaded(root)
    tick()
    CHANGES[change](root)
    after = loaded(root)
    assert after == fresh(root, monkeypatch) != before


def test_a_change_that_hides_behind_its_time_and_size_is_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root / "train" / "a b" / "1.png"
    before, stat = loaded(root), file.stat()
    write(file, "TRAIN/A B/1.PNG")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    assert loaded(root) == fresh(root, monkeypatch) != before


def test_what_changed_just_before_is_looked_at_again(
    root: Path, work: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within the same tick of the clock would leave the times as they are."""
    monkeypatch.setattr(_listing, "SETTLED", 3600 * 10**9)
    first, listed = loaded(root), len(work["listed"])
    assert loaded(root) == first
    assert len(work["read"]) == 10 and len(work["listed"]) == 2 * listed


def test_links_are_followed_each_time(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one" / "x.png", "one").parent
    two = write(tmp_path / "two" / "y.png", "two").parent
    hop = tmp_path / "hop"
    hop.symlink_to(one)
    (root / "train" / "ü" / "link").symlink_to(hop)
    before = loaded(root)
    assert "train/ü/link/x.png" in before
    tick()
    hop.unlink()
    hop.symlink_to(two)  # nothing in root has changed
    after = loaded(root)
    assert "train/ü/link/y.png" in after and after == fresh(root, monkeypatch)


def test_a_loop_of_links_ends(root: Path) -> None:
    (root / "train" / "ü" / "loop").symlink_to(root / "train")
    for _ in range(2):
        assert len(loaded(root)) == 5 + 2  # once more what lies beside it, and no further


def test_file_systems_that_may_not_keep_times_are_listed_each_time(
    root: Path, work: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_listing, "keeps_times", lambda folder: False)
    first, listed = loaded(root), len(work["listed"])
    assert loaded(root) == first and len(work["listed"]) == 2 * listed and len(work["read"]) == 5


MOUNTS = """\
1 0 8:1 / / rw - ext4 /dev/sda rw
2 1 0:2 / /mnt/my\\040bucket rw - fuse.gcsfuse bucket rw
3 2 8:3 / /mnt/my\\040bucket/disk rw - xfs /dev/sdb rw
4 1 0:4 / /mnt/my\\040bucketful rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("folder", "kept"),
    [
        ("/home/data", True), ("/mnt/my bucket/data", False), ("/mnt/my bucket/disk/x", True),
        ("/mnt/my bucketful", False), ("/mnt", True),
    ],
)  # fmt: skip
def test_the_mount_below_which_a_folder_lies_decides(folder: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **kwargs: MOUNTS)
    monkeypatch.setattr(_listing.os.path, "realpath", lambda path: path)
    assert keeps_times(folder) is kept


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other format"])
def test_what_is_damaged_is_forgotten(damage: str, root: Path, cache: Path, work: dict[str, list[str]]) -> None:
    first = loaded(root)
    files = [*cache.glob("listings/*"), *cache.glob("hashes/*")]
    assert len(files) == 2
    for file in files:
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 1
        elif damage == "other format":
            np.savez(file, format=np.int64(0))
            continue
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2]}.get(damage, bytes(data)))
    work["read"].clear()
    assert loaded(root) == first and len(work["read"]) == 5
    assert loaded(root) == first and len(work["read"]) == 5


def test_little_is_not_worth_a_file_and_a_cache_that_cannot_be_written_costs_time_alone(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_listing, "WORTH_FILES", 1000)
        loaded(root)
    assert not cache.exists()
    cache.write_text("a file")
    assert loaded(root) == loaded(root)


def test_other_choices_of_files_do_not_drive_each_other_out(root: Path, work: dict[str, list[str]]) -> None:
    files = sorted(str(path) for path in root.rglob("*.png"))

    def digests(rows: list[int]) -> np.ndarray:
        items = Chosen(Paths(files), np.array(rows))
        return Split(
            items=items, labels=np.zeros(len(rows), np.int64), names=[files[r] for r in rows], root=root
        ).digests

    first, second = digests([0, 1, 4]), digests([1, 3])
    assert len(work["read"]) == 4
    np.testing.assert_array_equal(digests([4, 3, 1, 0]), [first[2], second[1], second[0], first[0]])
    assert len(work["read"]) == 4


def _load(root: Path, ready: Any, queue: Any) -> None:
    ready.wait(60)
    queue.put([loaded(root) for _ in range(5)])


def test_processes_at_the_same_time(root: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, queue = context.Event(), context.Queue()
    workers = [context.Process(target=_load, args=(root, ready, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    ready.set()
    found = [each for _ in workers for each in queue.get(timeout=60)]
    for worker in workers:
        worker.join()
    expected = loaded(root)
    assert all(each == expected for each in found)
    assert len([*cache.rglob("*.npz")]) == 2 and not [*cache.rglob(".*")], "temporary files are left"


def test_names_that_are_no_unicode_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "r" / "c"
    folder.mkdir(parents=True)
    name = os.fsdecode(b"\xff\xfe.png")
    write(folder / name, "x")
    for _ in range(2):
        listing = Listing(tmp_path / "r")
        assert files_below(folder, IMAGES, listing).files == [os.path.join(folder, name)]
        listing.save()


def test_a_folder_that_cannot_be_read_is_named(root: Path) -> None:
    gone = root / "train" / "gone"
    with pytest.raises(UserError, match="train/gone cannot be read: No such file or directory"):
        files_below(gone, IMAGES, Listing(root))


def test_class_folders_without_images_are_named_or_left_out(root: Path) -> None:
    (root / "train" / "leer 空").mkdir()
    write(root / "train" / "notes" / "read.me", "")
    with pytest.raises(UserError) as caught:
        ImageFolder(root=str(root)).load(0)
    assert f"{root}/train/leer 空: the class folder has no image (it is empty)" in str(caught.value)
    assert "train/notes: the class folder has no image (only read.me)" in str(caught.value)
    found = read_split(root, root / "train", [])
    assert found.classes == ["a b", "ü"] and list(found.empty) == ["leer 空", "notes"]
    assert np.bincount(found.split.labels).tolist() == [2, 1]

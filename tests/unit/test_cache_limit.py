"""The bound of the cache: what was used last goes last, what is in use stays."""

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from coeft.cli.main import main
from coeft.data import _limit
from coeft.data._entries import cache_info, obtain
from coeft.data._limit import cache_limit
from coeft.errors import UserError

BYTES = 40_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COEFT_CACHE_SIZE", "100kB")
    return tmp_path / "cache"


class Store:
    """What is opened of an entry."""


def entry(key: str, size: int = BYTES, *, needed: int | None = None, kind: str = "images") -> Store:
    """An entry of so many bytes, built if it is not there."""

    def open_entry(folder: Path) -> tuple[Store, None] | None:
        return (Store(), None) if (folder / "meta.json").is_file() else None

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "data").write_bytes(bytes(size))
        return {"samples": 1, "made_from": key}

    return obtain(kind, key, open_entry, fill, needed=size if needed is None else needed)[0]


def used(cache: Path, key: str, seconds: float) -> None:
    """Say that an entry was used last at this time."""
    os.utime(cache / "images" / key / "meta.json", (seconds, seconds))


def keys() -> list[str]:
    return [found["key"] for found in cache_info()["entries"]]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("20GB", 20 * 10**9), ("1.5 gib", 3 * 2**29), ("7m", 7 * 10**6), ("2TiB", 2**41), ("0", 0)],
)  # fmt: skip
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COEFT_CACHE_SIZE", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "5 apples", "1e9", "GB", "i"])
def test_what_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COEFT_CACHE_SIZE", text)
    with pytest.raises(UserError, match=f"COEFT_CACHE_SIZE={text} is no size; give it as 20GB"):
        cache_limit()


def test_what_was_not_used_longest_goes_first(cache: Path) -> None:
    for number, key in enumerate(("first", "second")):
        entry(key)
        used(cache, key, 1000 + number)
    entry("first")  # used again, now
    entry("third")
    assert keys() == ["third", "first"]
    assert cache_info()["bytes"] <= 100_000


def test_what_is_in_use_stays(cache: Path) -> None:
    held = entry("old")
    used(cache, "old", 1000)
    entry("young")
    entry("new")
    assert sorted(keys()) == ["new", "old"]  # "young" had to go, though it was used later
    both = entry("new")
    with pytest.raises(
        UserError, match=r"may have 0 MB \(COEFT_CACHE_SIZE\), this data needs 0 MB.*set COEFT_CACHE_SIZE"
    ):
        entry("more")
    assert sorted(keys()) == ["new", "old"] and not [*(cache / "images").glob(".more.*/*")]
    del held, both
    entry("more")
    assert "more" in keys() and len(keys()) == 2


def test_an_entry_whose_size_was_not_known_makes_room_when_it_is_built(cache: Path) -> None:
    entry("a")
    entry("b")
    used(cache, "a", 1000)
    entry("text", needed=0, kind="tokens")
    assert sorted(keys()) == ["b", "text"]


def test_more_than_the_limit_is_refused_before_it_is_written(cache: Path) -> None:
    entry("small")
    with pytest.raises(UserError, match="set COEFT_CACHE_SIZE to more"):
        entry("large", 200_000)
    assert not (cache / "images" / "large").exists()


def _hold(key: str, opened: Any, done: Any) -> None:
    store = entry(key)
    opened.set()
    done.wait(60)
    del store


def test_another_process_keeps_what_it_has_open(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    opened, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=("theirs", opened, done))
    other.start()
    assert opened.wait(60)
    used(cache, "theirs", 1000)
    entry("ours")
    entry("next")
    assert sorted(keys()) == ["next", "theirs"]
    done.set()
    other.join()
    used(cache, "theirs", 1000)
    entry("last")
    assert sorted(keys()) == ["last", "next"]


def _build(key: str, ready: Any, queue: Any) -> None:
    ready.wait(60)
    try:
        store = entry(key, 30_000)
        queue.put((key, ""))
        del store
    except UserError as error:
        queue.put((key, str(error)))


def test_processes_that_build_at_once_stay_below_the_limit(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, queue = context.Event(), context.Queue()
    workers = [context.Process(target=_build, args=(f"k{n % 4}", ready, queue)) for n in range(8)]
    for worker in workers:
        worker.start()
    ready.set()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(not error or "COEFT_CACHE_SIZE" in error for _, error in found)
    assert sum(not error for _, error in found) >= 3
    assert cache_info()["bytes"] <= 100_000 and not [*cache.glob("images/.*/needed")]


def test_nobody_counts_while_an_entry_gets_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry("a", 60_000)
    used(cache, "a", 1000)
    rename, blocked = os.rename, []

    def slowly(folder: Path, name: Path) -> None:
        with open(cache / ".limit.lock", "ab") as other:
            blocked.append(not _limit._taken(other))
        rename(folder, name)

    monkeypatch.setattr(_limit.os, "rename", slowly)
    entry("b")
    assert blocked == [True] and not (cache / "images" / "b" / "needed").exists()


def test_what_a_dead_process_was_building_does_not_count(cache: Path) -> None:
    entry("a")
    left = cache / "images" / ".dead.x1"
    left.mkdir()
    (left / "needed").write_text("90000")
    entry("b")
    assert sorted(keys()) == ["a", "b"] and not left.exists()


def test_a_full_disk_takes_what_was_not_used_longest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry("a")
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(_limit.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    entry("b")
    assert keys() == ["b"]
    with pytest.raises(UserError, match="make room"):
        entry("c", 90_000)


def test_the_command_shows_the_limit_and_the_last_use(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry("a")
    used(cache, "a", 0)
    entry("b")
    assert main(["cache"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert " of at most 0 MiB" in first and [line.split()[-1] for line in rest] == ["b", "a"]
    assert "used 1970-01-01" in rest[1] or "used 1969-12-31" in rest[1]
    assert main(["cache", "clear"]) == 0 and main(["cache"]) == 0
    assert ": 0 files, 0.0 MiB" in capsys.readouterr().out

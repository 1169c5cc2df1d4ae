"""The table of wrong inputs: each ends with exit code 2, a message that says what would be right, and nothing left."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from small import coeft
from wrong import data, finished, settings
from wrong.case import Case
from wrong.runs import Makings

TABLE = [*settings.CASES, *data.CASES, *finished.CASES]


@pytest.fixture(scope="module")
def makings(tmp_path_factory: pytest.TempPathFactory) -> Makings:
    return Makings(tmp_path_factory.mktemp("makings"))


def snapshot(here: Path) -> dict[str, bytes | str]:
    """Everything below a folder, byte by byte; links as they stand."""
    found: dict[str, bytes | str] = {}
    for folder, names, files in os.walk(here):
        for name in [*names, *files]:
            if name in ("log.txt", ".lock"):  # a diary of each attempt to resume; which process was the last
                continue
            path = Path(folder) / name
            key = str(path.relative_to(here))
            if path.is_symlink():
                found[key] = os.readlink(path)
            else:
                found[key] = "a folder" if path.is_dir() else path.read_bytes()
    return found


def rows() -> list[Any]:
    """Every third row is a quick test, the others are slow ones."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if place % 3 else [])
        for place, case in enumerate(TABLE)
    ]


@pytest.mark.parametrize("case", rows())
def test_wrong_input(
    case: Case,
    makings: Makings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in case.needs:
        makings.copy(name, tmp_path)
    if case.make is not None:
        case.make(tmp_path)
    for key, value in case.environment.items():
        monkeypatch.setenv(key, value)
    if case.environment.get("HF_HUB_OFFLINE"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if case.stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(case.stdin))
    capsys.readouterr()
    before = snapshot(tmp_path)
    code = coeft(*case.argv)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert "Traceback" not in err and out == ""
    assert [word for word in case.words if word not in err] == [], err
    assert len(err) < 4000
    assert snapshot(tmp_path) == before  # nothing half-written, nothing changed


def test_the_table_is_long_and_has_no_row_twice(capsys: pytest.CaptureFixture[str]) -> None:
    names = [case.name for case in TABLE]
    assert sorted(set(names)) == sorted(names)
    assert len(names) >= 500
    with capsys.disabled():
        print(f" {len(names)} wrong inputs", end="")

"""A run that is killed, wherever it is, and resumed comes to the same as one that is not.

The same means, see killing.content: the numbers of results.json and of every fold, the bytes of every adapter, every
row of metrics.csv and every weight in the checkpoints.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from killing import Kill, Snapshots, content, differing, draw_nothing, rows, run, start
from models import minilm
from reviews import write_reviews
from small import QUICK, coeft, results, trained
from tiny_chat import chats, tiny_llama
from tiny_chat import command as chat_command

from coeft import checkpoint
from coeft.errors import UserError
from coeft.loggers._metrics_csv import cut

MOMENTS = 20261122  # the seed that the random moments are drawn from
DROPOUT = ["peft=[coeff,lora]", "peft.coeff.dropout=0.1", "peft.lora.dropout=0.1", "data.augment=[flip]"]
FIVE_FOLDS = [*QUICK, *DROPOUT, "cv.folds=5"]
TWO_FOLDS = [*QUICK, *DROPOUT, "cv.folds=2", "data.n_train=130"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coeft.plots._save", draw_nothing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def killed_and_resumed(line: list[str], run_dir: Path, moments: list[float], *, plots: bool = False) -> None:
    """Run a command, kill it and each resumed process after so many seconds, and resume it to its end.

    A process that is killed before there is a run is started again. Where the run is over before the first moment,
    which was drawn from a time measured under other load, earlier moments are tried: every call kills a run.
    """
    while not _met(line, run_dir, moments, plots=plots):
        shutil.rmtree(run_dir)
        moments = [0.7 * seconds for seconds in moments]


def _met(line: list[str], run_dir: Path, moments: list[float], *, plots: bool) -> bool:
    """Whether a kill met the run, which is whole in the end."""
    output, met = run_dir.with_name(f"{run_dir.name}.txt"), False
    for seconds in moments:
        begun = (run_dir / "config.yaml").is_file()
        child = start(["resume", run_dir] if begun else line, output, plots=plots)
        child.join(seconds)
        if child.pid is not None and child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        met = met or child.exitcode == -signal.SIGKILL
        if (run_dir / "results.json").is_file():
            return met
    begun = (run_dir / "config.yaml").is_file()
    assert run(["resume", run_dir] if begun else line, output, plots=plots) == 0, output.read_text()
    return met


def test_a_run_killed_at_three_random_moments(folder: Path) -> None:
    whole = folder / "three" / "whole"
    whole.parent.mkdir()
    output = whole.parent / "whole.txt"
    assert run(["train", *TWO_FOLDS, f"run_dir={whole}"], output) == 0, output.read_text()
    began = time.monotonic()
    assert run(["train", *TWO_FOLDS, f"run_dir={whole}2"], output) == 0
    takes = time.monotonic() - began
    assert not differing(content(whole), content(Path(f"{whole}2")))
    rng = random.Random(MOMENTS)
    stopped = whole.parent / "stopped"
    moments = [takes * rng.uniform(0.2, 0.8) for _ in range(3)]
    killed_and_resumed(["train", *TWO_FOLDS, f"run_dir={stopped}"], stopped, moments)
    assert not differing(content(whole), content(stopped))


@pytest.mark.slow
def test_a_run_of_five_folds_killed_at_25_random_moments(folder: Path) -> None:
    """Each of 25 runs is killed once at a random moment of its whole time, three of them again and again after."""
    (folder / "many").mkdir()
    whole = folder / "many" / "whole"
    assert run(["train", *FIVE_FOLDS, f"run_dir={whole}"], folder / "many" / "whole.txt", plots=True) == 0
    began = time.monotonic()
    assert run(["train", *FIVE_FOLDS, f"run_dir={whole}2"], folder / "many" / "whole.txt", plots=True) == 0
    takes = time.monotonic() - began
    expected, rng = content(whole), random.Random(MOMENTS)
    unequal = []
    for number in range(25):
        stopped = folder / "many" / f"run_{number}"
        moments = [rng.uniform(0, takes)]
        if number % 8 == 0:
            moments += [takes * rng.uniform(0.2, 0.5) for _ in range(4)]
        line = ["train", *FIVE_FOLDS, f"run_dir={stopped}"]
        killed_and_resumed(line, stopped, moments, plots=True)
        if wrong := differing(expected, content(stopped)):
            unequal.append((moments, wrong))
        shutil.rmtree(stopped)
    assert not unequal


def _resumed_from_snapshots(line: list[str], folder: Path) -> tuple[int, list[str]]:
    """Resume what a process killed at each change of its run directory would have left; their number, and the unequal.

    A folder without a config is no run yet: there the command itself is given again.
    """
    whole, kept = folder / "whole", folder / "kept"
    folder.mkdir()
    assert run([*line, f"run_dir={whole}"], folder / "whole.txt", Snapshots(whole, kept)) == 0
    expected, wrong = content(whole), []
    snapshots = sorted(kept.iterdir())
    for number, snapshot in enumerate(snapshots):
        moved = folder / f"moved_{number}"
        snapshot.rename(moved)
        begun, complete = ((moved / name).is_file() for name in ("config.yaml", "results.json"))
        code = coeft("resume", moved) if begun else coeft(*line, f"run_dir={moved}")
        if code != (2 if complete else 0) or differing(expected, content(moved)):
            wrong.append(f"{snapshot.name}: exit code {code}, {differing(expected, content(moved))}")
        shutil.rmtree(moved)
    return len(snapshots), wrong


@pytest.mark.slow
def test_a_run_killed_at_every_change_of_a_file(folder: Path) -> None:
    count, wrong = _resumed_from_snapshots(["train", *TWO_FOLDS], folder / "every")
    assert not wrong
    assert count > 60


@pytest.mark.slow
def test_a_suite_killed_at_every_change_of_a_file(folder: Path) -> None:
    line = ["train", *QUICK, "data.n_train=64", "data.batch_size=64", "trainer.max_epochs=1", "seeds=[0,1]"]
    count, wrong = _resumed_from_snapshots(line, folder / "suite")
    assert not wrong
    assert count > 30


VARIANTS = {
    "accumulated, with workers": ["trainer.micro_batch_size=8", "data.num_workers=2"],
    "sgd with a schedule": ["optim=sgd", "optim.schedule=cosine", "optim.warmup_fraction=0.2"],
    "full": ["peft=full"],
    "bitfit": ["peft=bitfit"],
    "no validation": ["cv.val_fraction=0"],
    "refit": ["cv.refit=true", "trainer.max_epochs=1"],
    "the command's own number of threads": ["trainer.threads=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_any_kind_resumes(name: str, folder: Path) -> None:
    """Killed in its second fold, before the checkpoint of an epoch is in its place."""
    dropout = [] if name in ("full", "bitfit") else DROPOUT
    line = ["train", *QUICK, *dropout, "cv.folds=2", "data.n_train=130", *VARIANTS[name]]
    place = folder / name.replace(" ", "_")
    place.mkdir()
    assert run([*line, f"run_dir={place / 'whole'}"], place / "out.txt") == 0, (place / "out.txt").read_text()
    last = "fold_1/checkpoints/last.ckpt"
    kill = Kill(place / "killed", last, 1 if "max_epochs=1" in line[-1] else 2)
    assert run([*line, f"run_dir={place / 'killed'}"], place / "out.txt", kill) == -signal.SIGKILL
    assert run(["resume", place / "killed"], place / "out.txt") == 0
    assert not differing(content(place / "whole"), content(place / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chats", "packed texts", "a table"])
def test_text_resumes(kind: str, folder: Path) -> None:
    place = folder / kind.replace(" ", "_")
    place.mkdir()
    if kind == "a table":
        table = write_reviews(place / "reviews.csv", 48)
        line = ["train", "recipe=text/sentiment", f"backbone.name={minilm()}", "trainer.progress=false"]
        line += [f"data.path={table}", "cv.folds=0", "data.batch_size=16", "trainer.max_epochs=2"]
    else:
        packing = ["task.packing=true"] if kind == "packed texts" else []
        line = ["train", *chat_command(tiny_llama(place / "llama")), f"data.path={chats(place / 'chats.jsonl')}"]
        line += ["data.messages=messages", "peft=lora", "trainer.max_epochs=3", "task.max_new_tokens=4", *packing]
    assert run([*line, f"run_dir={place / 'whole'}"], place / "out.txt") == 0, (place / "out.txt").read_text()
    kill = Kill(place / "killed", "checkpoints/last.ckpt", 2)
    assert run([*line, f"run_dir={place / 'killed'}"], place / "out.txt", kill) == -signal.SIGKILL
    assert run(["resume", place / "killed"], place / "out.txt") == 0
    assert not differing(content(place / "whole"), content(place / "killed"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Two folds that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coeft.plots._save", draw_nothing)
        assert coeft("train", *TWO_FOLDS, f"run_dir={folder / 'whole'}") == 0
    return folder / "whole"


@pytest.mark.parametrize(
    ("number", "path", "n"),
    [(signal.SIGINT, "metrics.csv", 4), (signal.SIGTERM, "fold_0/adapter", 1)],
    ids=["training", "between folds"],
)
def test_a_signal_stops_with_the_command_that_continues(
    number: int, path: str, n: int, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.txt"
    kill = Kill(tmp_path / "run", path, n, number=number)
    assert run(["train", *TWO_FOLDS, f"run_dir={tmp_path / 'run'}"], output, kill) == 130
    assert output.read_text().splitlines()[-1] == f"coeft: stopped; continue by `coeft resume {tmp_path / 'run'}`"
    assert "Traceback" not in output.read_text()
    assert coeft("resume", tmp_path / "run") == 0
    assert not differing(content(whole), content(tmp_path / "run"))


def test_a_signal_before_there_is_a_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, stopped = tmp_path / "out.txt", tmp_path / "run"
    kill = Kill(stopped, "config.yaml", number=signal.SIGTERM)
    assert run(["train", *TWO_FOLDS, f"run_dir={stopped}"], output, kill) == 130
    assert "stopped before the first step" in output.read_text().splitlines()[-1]
    assert coeft("resume", stopped) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert coeft("train", *TWO_FOLDS, f"run_dir={stopped}") == 0
    assert not differing(content(whole), content(stopped))


def test_signals_in_a_row_to_all_processes(whole: Path, tmp_path: Path) -> None:
    """As a shell sends them to a job with workers."""
    output, stopped = tmp_path / "out.txt", tmp_path / "run"
    child = start(["train", *TWO_FOLDS, "data.num_workers=2", f"run_dir={stopped}"], output)
    while not (stopped / "fold_0" / "checkpoints" / "last.ckpt").is_file():
        assert child.exitcode is None, output.read_text()
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.killpg(child.pid, number)
        time.sleep(0.02)
    child.join(60)
    assert child.exitcode == 130
    assert "continue by `coeft resume" in output.read_text()
    assert "fault of coeft" not in output.read_text()  # torch may say that a loader was cut short
    assert coeft("resume", stopped) == 0
    expected, found = content(whole), content(stopped)
    assert differing(expected, found) in ([], ["config.yaml"])  # which holds data.num_workers


def test_a_signal_in_a_suite_names_the_suite(tmp_path: Path) -> None:
    output, suite = tmp_path / "out.txt", tmp_path / "suite"
    line = ["train", *QUICK, "seeds=[0,1]", f"run_dir={suite}"]
    kill = Kill(suite, "seed_1/checkpoints/last.ckpt", number=signal.SIGTERM)
    assert run(line, output, kill) == 130
    assert output.read_text().splitlines()[-1] == f"coeft: stopped; continue by `coeft resume {suite}`"
    assert coeft("resume", suite) == 0
    assert list(results(suite)["members"]) == ["seed_0", "seed_1"]


def test_an_early_stop_is_not_forgotten(tmp_path: Path) -> None:
    """Killed after the epoch that was one too many, before the fold was scored."""
    extra = ["trainer.max_epochs=30", "trainer.patience=1", "optim.lr=1e-6", "peft=none"]
    trained(tmp_path / "whole", *extra)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    for name in ("results.json", "fold.json", "folds.csv"):
        (tmp_path / "moved" / name).unlink()
    shutil.rmtree(tmp_path / "moved" / "adapter")
    assert coeft("resume", tmp_path / "moved") == 0
    assert not differing(content(tmp_path / "whole"), content(tmp_path / "moved"))
    assert results(tmp_path / "moved")["samples_per_s"] > 0  # what the killed process trained counts


def test_checkpoints_hold_what_is_trained_and_no_more(whole: Path) -> None:
    last = torch.load(whole / "fold_0" / "checkpoints" / "last.ckpt", weights_only=True)
    names = set(last["state_dict"])
    assert names and all("lora" in name or "coeff" in name or ".head." in name for name in names)
    trained_values = sum(tensor.numel() for tensor in last["state_dict"].values())
    assert trained_values == results(whole)["trainable_params"] < results(whole)["total_params"] / 5
    optimizer = sum(v.numel() for s in last["optimizer_states"][0]["state"].values() for v in s.values())
    assert optimizer <= 2 * trained_values + 3 * len(names)
    best = torch.load(whole / "fold_0" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == results(whole)["folds"][0]["best_epoch"]
    assert str(whole) not in str({key: value for key, value in last.items() if key != "state_dict"})


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path, files = tmp_path / "last.ckpt", checkpoint.AtomicFiles()
    files.save_checkpoint({"epoch": 0}, path)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        files.save_checkpoint({"epoch": 1, "unwritable": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_does_not_fit_is_refused(whole: Path, tmp_path: Path) -> None:
    good = whole / "fold_0" / "checkpoints" / "last.ckpt"
    base = torch.load(good, weights_only=True)["coeft"]["base"]
    torn = tmp_path / "last.ckpt"
    torn.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"last.ckpt: not a readable checkpoint"):
        checkpoint.read(torn, base)
    torch.save({"epoch": 1, "state_dict": {}}, torn)
    with pytest.raises(UserError, match="not a checkpoint of this version of coeft"):
        checkpoint.read(torn, base)
    with pytest.raises(UserError, match="other weights of the base model"):
        checkpoint.read(good, "another hash")


def test_rows_of_metrics_are_cut_after_the_last_finished_epoch(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    lines = "fold,epoch,step,train/loss 0,0,0,1.5 0,1,1,1.4 0,10,9,1.1 1,0,0,1.6 1,1,1,1.3 1,2,2,1.2".split()
    text = "".join(f"{line}\r\n" for line in lines)
    file.write_bytes(text.encode())
    cut(file, fold=1, first_epoch=2)
    assert file.read_bytes() == "".join(f"{line}\r\n" for line in lines[:-1]).encode()
    for length in range(len(text)):  # a process that was killed while it wrote
        file.write_bytes(text.encode()[:length])
        cut(file, fold=1, first_epoch=2)
        whole_rows = max(0, text[:length].count("\r\n") - 1)
        assert file.exists() == ("\r\n" in text[:length])
        assert not file.exists() or len(rows(file)) == min(whole_rows, 5)

"""trainer.devices=2 on the CPU: two processes are one run."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from following import fork
from safetensors.torch import load_file
from small import TINY, coeft, command, lasting, results
from tiny_chat import chats, questions, tiny_llama
from tiny_chat import command as language
from tiny_hf import tiny_model

TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
DIVIDED = ["trainer.devices=2", "trainer.strategy=fsdp"]
DIGITS = [*TINY, "data=digits", "data.resize=squash", "trainer.progress=false", "peft.coeff.dropout=0"]
# 45 or 46 training samples: the last step has 13 or 14, of which a process gets 6 or 7, in micro-batches of 4
FOLDS = [*DIGITS, "peft=[coeff,lora]", "data.n_train=101", "cv.folds=2", "data.batch_size=16", "trainer.max_epochs=3"]
FOLDS += ["trainer.micro_batch_size=4"]
LONG = [*DIGITS, "peft=[coeff,lora]", "data.n_train=100", "data.n_test=45", "trainer.max_epochs=12"]


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(file)]


def files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def close(one: Any, other: Any) -> None:
    """Numbers in nested values are equal to round-off, everything else is equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            close(first, second)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=2e-5, abs=2e-5)
    else:
        assert one == other


def same(one: Path, other: Path) -> None:
    """Two runs are equal but for times, memory and round-off."""
    close(lasting(results(one)), lasting(results(other)))
    close(rows(one), rows(other))
    assert files(one) == files(other)
    for path in sorted(one.rglob("adapter/**/*.safetensors")):
        first, second = load_file(path), load_file(other / path.relative_to(one))
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-5)
    for path in sorted(one.rglob("fold.json")):
        first, second = (json.loads(file.read_text()) for file in (path, other / path.relative_to(one)))
        assert first["extras"] == second["extras"]  # the confusion matrix
        assert first["samples_seen"] == second["samples_seen"]


def written(one: Path, other: Path) -> None:
    """The settings beside the tensors of two runs' adapters are equal."""
    for path in sorted(one.rglob("adapter/**/*.json")):
        close(json.loads(path.read_text()), json.loads((other / path.relative_to(one)).read_text()))


def said(run: Path) -> list[str]:
    """Lines of log.txt without times, speeds and numbers that round-off may change."""
    lines = (run / "log.txt").read_text().splitlines()
    return [re.sub(r"\d\.\d{4}|\d+ samples/s", "", line.split(" ", 2)[2]) for line in lines]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork(monkeypatch)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDS in one process."""
    run = tmp_path_factory.mktemp("processes") / "one"
    assert coeft("train", *FOLDS, f"run_dir={run}") == 0
    return run


def others(process: psutil.Process) -> list[psutil.Process]:
    """The further processes of a run, without what multiprocessing starts for itself."""
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def epochs(run: Path) -> list[str]:
    """Lines of log.txt about epochs."""
    lines = (run / "log.txt").read_text().splitlines()
    return [line.split(" ", 3)[3] for line in lines if " INFO epoch" in line]


@pytest.mark.usefixtures("forked")
def test_a_cross_validation_of_two_processes_is_that_of_one(
    one: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two = tmp_path / "two"
    assert coeft("train", *FOLDS, *TWO, f"run_dir={two}") == 0
    shown = capfd.readouterr()
    same(one, two)
    for fold in (0, 1):
        outcome = json.loads((two / f"fold_{fold}" / "fold.json").read_text())
        assert outcome["samples_seen"] == 3 * outcome["row"]["n_train"]  # each once an epoch
    assert sum(fold["n_test"] for fold in results(two)["folds"]) == 101
    assert said(one) == said(two)
    assert shown.out.splitlines() == [str(two)]  # each line comes from one process
    assert [line for line in shown.err.splitlines() if line.startswith("epoch")] == epochs(two)
    assert "warn" not in shown.err.lower()
    assert not torch.distributed.is_initialized() and not multiprocessing.active_children()


@pytest.mark.usefixtures("forked")
def test_a_run_of_divided_weights_resumes(one: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"

    def interrupt() -> None:
        while not (run / "fold_1" / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert coeft("train", *FOLDS, *DIVIDED, f"run_dir={run}") == 130
    assert capfd.readouterr().err.splitlines()[-1] == f"coeft: stopped; continue by `coeft resume {run}`"
    last = torch.load(run / "fold_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {type(value) for value in last["state_dict"].values()} == {torch.Tensor}
    assert not any(name.endswith("qkv.weight") for name in last["state_dict"])  # nothing that is frozen
    assert coeft("resume", run) == 0
    same(one, run)
    written(one, run)
    assert coeft("eval", run) == 0


@pytest.mark.slow
def test_divided_weights_by_the_command(one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    shown = command("train", *FOLDS, *DIVIDED, f"run_dir={two}")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == f"{two}\n" and "warn" not in shown.stderr.lower()
    same(one, two)
    assert said(one) == said(two)
    written(one, two)


@pytest.mark.usefixtures("forked")
def test_divided_language_models_write_samples(tmp_path: Path) -> None:
    """Generation takes all processes, and the texts end after different numbers of tokens."""
    line = [*language(tiny_llama(tmp_path / "llama"), "causal_lm"), "peft=[lora,coeff]", "peft.coeff.dropout=0"]
    line += [f"data.path={chats(tmp_path / 'data.jsonl', 45)}", "data.messages=messages", "task.loss_on=all"]
    line += ["task.samples_per_epoch=2", "task.max_new_tokens=4", "trainer.max_epochs=1", "trainer.micro_batch_size=4"]
    line += ["backbone.gradient_checkpointing=true"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'one'}") == 0
    assert coeft("train", *line, *DIVIDED, f"run_dir={tmp_path / 'two'}") == 0
    same(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes(
    one: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, killed = tmp_path / "run", list[float]()

    def kill() -> None:
        while not (run / "fold_0" / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
        [other] = others(psutil.Process())
        other.kill()
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert coeft("train", *FOLDS, *TWO, f"run_dir={run}") == 130
    assert time.monotonic() - killed[0] < 120  # not the half hour that a process waits for the others
    shown = capfd.readouterr().err
    last = shown.splitlines()[-1]
    assert last.startswith("coeft: process 2 of 2 was killed (SIGKILL)") and last.endswith(f"`coeft resume {run}`")
    assert "Traceback" not in shown and not (run / "results.json").exists()
    fork(monkeypatch)
    assert coeft("resume", run) == 0
    same(one, run)


@pytest.mark.usefixtures("forked")
def test_a_signal_to_the_first_process_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"

    def terminate() -> None:
        while not (run / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    assert coeft("train", *LONG, *TWO, "trainer.max_epochs=50", f"run_dir={run}") == 130
    assert capfd.readouterr().err.splitlines()[-1] == f"coeft: stopped; continue by `coeft resume {run}`"
    assert not multiprocessing.active_children()


@contextmanager
def training(run: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, from the moment its first epoch is kept."""
    line = [sys.executable, "-m", "coeft.cli", "train", *LONG, *TWO, *overrides, f"run_dir={run}"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LONG in two processes, with dropout, which each of them draws for itself."""
    run = tmp_path_factory.mktemp("processes") / "unstopped"
    with pytest.MonkeyPatch.context() as patch:
        fork(patch)
        assert coeft("train", *LONG, *TWO, "peft.lora.dropout=0.1", f"run_dir={run}") == 0
    return run


def identical(one: Path, other: Path) -> None:
    assert lasting(results(one)) == lasting(results(other))
    assert rows(one) == rows(other)
    for path in sorted(one.rglob("adapter/**/*.safetensors")):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("end", ["interrupt", "terminate", "kill the second", "kill the first"])
def test_however_a_run_ends_it_resumes_to_the_same_bytes(unstopped: Path, tmp_path: Path, end: str) -> None:
    run = tmp_path / "run"
    with training(run, "peft.lora.dropout=0.1") as process:
        [second] = others(psutil.Process(process.pid))
        if end == "interrupt":
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to all of them
        elif end == "terminate":
            process.terminate()
        else:
            (second if end == "kill the second" else process).kill()
        _, shown = process.communicate(timeout=60)
        psutil.wait_procs([second], timeout=20)
        assert not second.is_running()
    assert process.returncode == (-signal.SIGKILL if end == "kill the first" else 130)
    if end != "kill the first":
        assert shown.splitlines()[-1].endswith(f"`coeft resume {run}`") and "Traceback" not in shown
    assert not (run / "results.json").exists()
    assert coeft("resume", run) == 0
    identical(unstopped, run)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("form", ["a row for each text", "packed", "choices"])
def test_language_models_weigh_tokens_over_all_processes(tmp_path: Path, form: str) -> None:
    task = "multiple_choice" if form == "choices" else "causal_lm"
    line = [*language(tiny_llama(tmp_path / "llama"), task), "peft=lora", "peft.lora.rank=4", "trainer.max_epochs=2"]
    if form == "choices":
        line += [f"data.path={questions(tmp_path / 'data.jsonl', 45)}"]
        line += ["data.input=question", "data.choices=choices", "data.label=answer"]
    else:  # whole chats are learnt, and they are of different lengths
        line += [f"data.path={chats(tmp_path / 'data.jsonl', 45)}", "data.messages=messages", "task.loss_on=all"]
        line += ["task.samples_per_epoch=2", "task.max_new_tokens=4"]
        line += ["task.packing=true"] if form == "packed" else ["trainer.micro_batch_size=2"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'one'}") == 0
    assert coeft("train", *line, *TWO, f"run_dir={tmp_path / 'two'}") == 0
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
def test_three_processes_with_workers_that_fetch(tmp_path: Path) -> None:
    line = [*LONG, "trainer.max_epochs=2", "data.num_workers=2", "data.batch_size=24", "cv.val_fraction=0.05"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'one'}") == 0
    assert coeft("train", *line, "trainer.devices=3", f"run_dir={tmp_path / 'three'}") == 0
    same(tmp_path / "one", tmp_path / "three")


@pytest.mark.usefixtures("forked")
def test_trained_parameters_without_a_part_in_the_loss(tmp_path: Path) -> None:
    """Dinov2 has a token for masked patches, which no classifier uses: plain ddp would wait for its gradient."""
    tiny_model("dinov2").save_pretrained(tmp_path / "model")
    line = [
        "backbone=hf",
        f"backbone.name={tmp_path / 'model'}",
        "data=digits",
        "data.resize=squash",
        "data.n_train=60",
    ]
    line += ["peft=full", "trainer.max_epochs=2", "trainer.progress=false", "optim=sgd", "data.batch_size=16"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'one'}") == 0
    assert coeft("train", *line, "trainer.devices=2", f"run_dir={tmp_path / 'two'}") == 0
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_under_torchrun(tmp_path: Path, strategy: str) -> None:
    """Two torchruns on this machine stand for two machines; what they say comes from the first."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for node in (0, 1):
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node-rank={node}",
            "--nproc-per-node=1",
        ]
        line += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "coeft.cli", "train", *LONG]
        line += [f"trainer.strategy={strategy}", f"run_dir={tmp_path / 'two'}"]
        processes.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output for output, _ in outputs] == [f"{tmp_path / 'two'}\n", ""]
    assert "epoch 11, loss" in outputs[0][1] and "epoch 11, loss" not in outputs[1][1]
    assert coeft("train", *LONG, f"run_dir={tmp_path / 'one'}") == 0
    same(tmp_path / "one", tmp_path / "two")

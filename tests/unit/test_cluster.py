"""Jobs on Ray, on one cluster of this machine: every job comes back once, lost ones go on, hopeless ones fail."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dying import sleeps, walks

from coeft.errors import UserError
from coeft.sweep import cluster
from coeft.sweep.cluster import RayLauncher
from coeft.sweep.launch import Run
from coeft.sweep.settings import Sweep

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster that a launcher started, to which this process stays connected."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))  # the nodes import the jobs by name
        launcher = RayLauncher(2, walks, tmp_path_factory.mktemp("own"), address=None, gpus=None, cpus=lambda job: 64)
        yield
        launcher.close()
    assert not launcher.ray.is_initialized()
    assert not [child for child in psutil.Process().children(recursive=True) if "raylet" in child.name()]


def on(folder: Path, run: Run, count: int = 2, **kwargs: Any) -> RayLauncher:
    return RayLauncher(count, run, folder, address="auto", **{"gpus": None, "cpus": lambda job: 1, **kwargs})


def test_no_job_is_lost_and_none_comes_back_twice(
    connected: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "ATTEMPTS", 2)
    deaths = [0, 1, 0, 2, 0]  # of a job's process, at the end as many as there are attempts
    jobs = [(tmp_path / str(number), 5, count) for number, count in enumerate(deaths)]
    launcher, waiting, came = on(tmp_path, walks), list(jobs), []
    while waiting or launcher.busy():
        while waiting and launcher.has_room():
            launcher.submit(waiting.pop(0))
        assert launcher.busy() <= 2
        came.append(launcher.wait())
    launcher.close()
    assert sorted(job for job, _ in came) == sorted(jobs)
    for (folder, steps, died), done in came:
        if died == cluster.ATTEMPTS:
            assert done.state == "failed" and done.fault and f"lost {died} times" in (done.error or "")
            continue
        assert done.state == "complete"
        assert (folder / "steps").read_text().split() == [str(step) for step in range(steps)]  # none taken twice
        assert (done.values[0] > 0) == (died > 0)  # the last attempt went on
    assert caplog.text.count("goes on from its last checkpoint") == 2
    assert capfd.readouterr().out == ""


def test_closing_ends_what_runs(connected: None, tmp_path: Path) -> None:
    launcher = on(tmp_path, sleeps)
    launcher.submit(tmp_path / "pid")
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    launcher.close()
    process.wait(30)
    assert launcher.busy() == 0 and not (tmp_path / cluster.MARK).exists()


def test_a_node_must_see_the_folder_and_have_the_same_coeft(
    connected: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = on(tmp_path, walks)
    (tmp_path / cluster.MARK).unlink()
    tmp_path.rename(tmp_path.with_name("elsewhere"))  # as on a machine that does not mount it
    launcher.submit((tmp_path / "job", 1, 0))
    with pytest.raises(UserError, match="file system that all nodes share"):
        launcher.wait()
    launcher.close()
    tmp_path.mkdir()
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    launcher = on(tmp_path, walks)
    launcher.submit((tmp_path / "job", 1, 0))
    with pytest.raises(UserError, match="the sweep is of 0.0.1"):
        launcher.wait()
    launcher.close()
    assert not (tmp_path / "job").exists()


def test_what_no_node_has_is_told_before_anything_waits_for_it(connected: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no node of the Ray cluster has 64 CPUs"):
        on(tmp_path, walks, cpus=lambda job: 64).submit((tmp_path / "job", 1, 0))
    with pytest.raises(UserError, match="has 1 CPUs and 2 GPUs, .*sweep.gpus=N"):
        on(tmp_path, walks, gpus=2).submit((tmp_path / "job", 1, 0))


def test_an_address_without_a_cluster_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing answers at 127.0.0.1:1 "):
        cluster._reach("127.0.0.1:1")


def test_a_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'coeft\[ray\]'"):
        RayLauncher(1, walks, tmp_path, address="auto", gpus=None, cpus=lambda job: 1)


def test_a_ray_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**options: Any) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"does not start here: The current node timed out.*sweep.launcher=local"):
        RayLauncher(1, walks, tmp_path, address=None, gpus=None, cpus=lambda job: 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launcher": "rya"}, "did you mean ray"),
        ({"address": "auto"}, "belongs to sweep.launcher=ray"),
        ({"launcher": "ray", "address": "ray://head:10001"}, "HOST:PORT or auto"),
        ({"launcher": "ray", "gpus": 1.5}, "a part of one GPU"),
        ({"launcher": "ray", "gpus": -1}, "a part of one GPU"),
    ],
)
def test_settings_of_the_cluster_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sweep(**settings)
    Sweep(launcher="ray", address="head.example:6379", gpus=0.5)

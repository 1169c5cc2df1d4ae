"""The commands: help, exit codes, what goes to which stream, and what each hands to the library."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import coeft
from coeft.cli.catalogue import RECIPES, options, recipe_names
from coeft.cli.main import COMMANDS, main
from coeft.config import FOLDERS, NOTHING, TrainConfig
from coeft.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """library("train", "train", result): put a stand-in for coeft.train.train; its calls are collected."""

    def stand_in(module: str, function: str, result: Any = None) -> list[Any]:
        calls: list[Any] = []

        def called(*arguments: Any, **options: Any) -> Any:
            calls.append((*arguments, *options.values()))
            if isinstance(result, BaseException):
                raise result
            return result

        fake = ModuleType(f"coeft.{module}")
        setattr(fake, function, called)
        monkeypatch.setitem(sys.modules, f"coeft.{module}", fake)
        return calls

    return stand_in


def test_help_lists_every_command(capsys: Capture) -> None:
    for argv in ([], ["-h"], ["--help"]):
        assert main(argv) == 0
        printed = capsys.readouterr()
        assert all(f"  {name} " in printed.out for name in COMMANDS) and not printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: coeft {command} ")


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{coeft.__version__}\n"


def test_help_and_version_import_neither_torch_nor_hydra() -> None:
    code = f"""
import sys
from coeft.cli.main import main
assert main(["--help"]) == 0 and main(["--version"]) == 0 and main(["list", "methods"]) == 0
assert main(["show", "method", "lora"]) == 0
assert not {{"torch", "hydra", "numpy"}} & set(sys.modules)
for command in {list(COMMANDS)!r}:
    assert main([command, "--help"]) == 0
assert not {{"torch", "numpy", "lightning", "rich"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_console_script_and_the_module_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("coeft")
    for program in ([str(script)], [sys.executable, "-m", "coeft.cli"]):
        run = subprocess.run([*program, "trian"], capture_output=True, text=True)
        assert (run.returncode, run.stdout, run.stderr) == (2, "", "coeft: no command 'trian'; did you mean train?\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lst"], "no command 'lst'; did you mean list?"),
        (["list", "recipe"], "list: no 'recipe'; did you mean recipes?"),
        (["list", "recipes", "no such"], "no recipes match 'no such'"),
        (["list"], "list: the following arguments are required: WHAT; see coeft list --help"),
        (["show", "recipe", "quickstrat"], "no recipe 'quickstrat'; did you mean quickstart"),
        (["show", "method", "bitfti"], "no method 'bitfti'; did you mean bitfit"),
        (["train", "--confg-dir", "x"], "train: no flag --confg-dir; did you mean --config-dir"),
        (["train", "--cfg", "hydra"], "--cfg hydra: only --cfg job"),
        (["train", "--resolve"], "--resolve and --package belong to --cfg job"),
        (["train", "--config-name", "x"], "--config-name x needs --config-dir FOLDER, the folder of the file"),
        (["train", "--cfg", "job", "-p", "optm"], "--package optm: no 'optm'; did you mean optim?"),
        (["eval", "data.root=x"], "eval: the run directory comes first, not data.root=x"),
        (["eval", "RUN", "optim.lr=3"], "optim.lr=3: coeft eval takes data=NAME, data.KEY=VALUE and trainer.KEY=VALUE"),
        (["eval", "RUN", "data=digit"], "data: no option 'digit'; did you mean digits?"),
        (["export", "adaptor", "RUN"], "export: no 'adaptor'; did you mean adapter?"),
        (["export", "adapter", "RUN", "--fold", "x"], "export: argument --fold: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line(argv: list[str], message: str, capsys: Capture) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"coeft: {message}") and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("that is wrong\nand this"), 2, "coeft: that is wrong\nand this\n"),
        (KeyboardInterrupt(), 130, "coeft: interrupted\n"),
        (
            KeyboardInterrupt("stopped; continue by `coeft resume x`"),
            130,
            "coeft: stopped; continue by `coeft resume x`\n",
        ),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, message: str, library: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library("train", "resume", raised)
    monkeypatch.delenv("COEFT_DEBUG", raising=False)
    assert main(["resume", "x"]) == code
    assert capsys.readouterr() == ("", message)
    monkeypatch.setenv("COEFT_DEBUG", "1")
    assert main(["resume", "x"]) == code
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith(message)


def test_a_fault_of_coeft_shows_its_traceback_and_how_to_report(library: Any, capsys: Capture) -> None:
    library("train", "resume", ZeroDivisionError("by zero"))
    assert main(["resume", "x"]) == 1
    error = capsys.readouterr().err
    assert (
        "Traceback" in error
        and "fault of coeft" in error
        and "ZeroDivisionError: by zero" in error
        and "report" in error
    )


def test_an_exit_inside_a_library_keeps_its_code(library: Any, capsys: Capture) -> None:
    library("train", "resume", SystemExit("no luck"))
    assert main(["resume", "x"]) == 1 and capsys.readouterr().err == "no luck\n"


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["list", "recipes"]) == 0


def test_train_hands_a_checked_config_to_the_library(library: Any, capsys: Capture) -> None:
    calls = library("train", "train", Path("runs/x y"))
    before = list(sys.argv)
    assert main(["train", "recipe=quickstart", "peft=lora", "seed=3"]) == 0
    ((config,),) = calls
    assert isinstance(config, TrainConfig) and (config.seed, list(config.peft)) == (3, ["lora"])
    assert capsys.readouterr().out.splitlines()[-1] == "runs/x y"
    assert sys.argv == before  # Lightning starts its other processes from it


def test_train_hands_suites_and_dry_runs_to_the_library(library: Any, capsys: Capture) -> None:
    suites, dry = library("suite", "run_suite", Path("runs/s")), library("dry_run", "dry_run")
    assert main(["train", "recipe=quickstart", "seeds=[0,1]"]) == 0
    ((config, members),) = suites
    assert config.seeds == [0, 1] and [member.seed for member in members.values()] == [0, 1]
    assert capsys.readouterr().out == "runs/s\n"
    assert main(["train", "recipe=quickstart", "dry_run=true", "seeds=[0,1]"]) == 0
    assert [call[0].seed for call in dry] == [0, 1] and len(suites) == 1
    assert capsys.readouterr().out == ""


def test_multirun_runs_one_after_another(library: Any, capsys: Capture) -> None:
    calls = library("train", "train", Path("runs/x"))
    assert main(["train", "-m", "recipe=quickstart", "peft=lora,none"]) == 0
    assert [list(config.peft) for (config,) in calls] == [["lora"], []]
    assert capsys.readouterr() == ("runs/x\nruns/x\n", "run 1 of 2\nrun 2 of 2\n")


def test_nothing_runs_when_one_of_several_is_wrong(library: Any) -> None:
    calls = library("train", "train", Path("runs/x"))
    assert main(["train", "-m", "recipe=quickstart", "optim.lr=1,-1"]) == 2
    assert not calls


def test_the_other_commands_hand_over_what_was_typed(library: Any, capsys: Capture) -> None:
    home = Path.home()
    resumed = library("train", "resume", Path("runs/r"))
    assert main(["resume", "~/runs/ü [1]=x"]) == 0 and resumed == [(home / "runs/ü [1]=x", NOTHING)]
    predicted = library("predict", "predict")
    assert main(["predict", "RUN", "~/a b.png", "c=d.png", "--out", "~/x.csv", "e"]) == 0
    assert predicted == [(Path("RUN"), ["~/a b.png", "c=d.png", "e"], home / "x.csv", None, {}, NOTHING)]
    assert main(["predict", "RUN", "a prompt", "--fold", "1", "--temperature", "0.5"]) == 0
    assert predicted[1:] == [(Path("RUN"), ["a prompt"], None, 1, {"temperature": 0.5}, NOTHING)]
    exported = library("export", "export_adapter", Path("out"))
    assert main(["export", "adapter", "RUN", "--fold", "2"]) == 0 and exported == [(Path("RUN"), None, 2, NOTHING)]
    model = library("export", "export_model", (Path("model"), ["one line"]))
    assert main(["export", "model", "RUN", "--coeff", "expand", "--threshold", "0.1", "--out", "~/m"]) == 0
    assert model == [(Path("RUN"), home / "m", None, "expand", 0.1, NOTHING)]
    assert capsys.readouterr().out == f"{home / 'runs/ü [1]=x'}\nout\nmodel\n"


def test_eval_reads_its_overrides(library: Any) -> None:
    calls = library("evaluate", "evaluate", {})
    assert main(["eval", "RUN"]) == 0 and calls.pop() == (Path("RUN"), {}, NOTHING)
    assert main(["eval", "RUN", "data=image_folder", "data.root=~/a b=c", "trainer.threads=2"]) == 0
    ((run, overrides, allowed),) = calls
    assert allowed == NOTHING
    assert (overrides["data.root"], overrides["trainer.threads"]) == ("~/a b=c", 2)
    assert overrides["data"]["kind"] == "image_folder"


def test_what_is_listed_is_what_the_folders_hold(capsys: Capture) -> None:
    groups = {"methods": "peft", "backbones": "backbone", "datasets": "data"}
    for what, names in [("recipes", recipe_names()), *((what, options(group)) for what, group in groups.items())]:
        assert main(["list", what]) == 0
        lines = capsys.readouterr().out.splitlines()
        lines = lines[1:] if what in ("methods", "recipes") else lines  # a table with a head
        assert [line.split()[0] for line in lines] == names
        assert all(len(line.split()) > 1 for line in lines), what
    assert main(["list", "recipes", "compare"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "task", "backbone", "stack", "data", "network"]
    assert row.split("  ")[0] == "quickstart/compare"
    assert set(groups.values()) < set(FOLDERS)


def test_methods_are_listed_with_what_they_train_on_a_backbone(capsys: Capture) -> None:
    assert main(["list", "methods", "coeff"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "family", "merges", "source"]
    assert row.startswith("coeff   attention maps  no      arXiv:2503.18337  Coeff-Tuning: every head")
    assert main(["list", "methods", "lora", "backbone=vit_mini", "peft.lora.rank=2"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["lora"][3] == f"{6 * 2 * (128 + 3 * 128 + 128 + 128):,}" and "melora" in rows
    assert main(["list", "methods", "a", "b"]) == 2 and main(["list", "methods", "nothing"]) == 2
    assert main(["list", "methods", "lora", "backbone=vit_mnii"]) == 2
    assert "did you mean vit_mini" in capsys.readouterr().err


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder of runs as a listing sees them: complete, incomplete, damaged, and the fold of one."""
    for name, results in {
        "a": {"status": "completed", "metric": "accuracy", "value": 0.5, "std": 0.25, "trainable_params": 1234},
        "a/fold_0": None,
        "b c": None,
        "d": "broken",
        "e/f": {"status": "completed", "metric": "macro_f1", "value": 0.9, "trainable_params": 10},
    }.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        if results:
            (run / "results.json").write_text(json.dumps(results) if isinstance(results, dict) else results)
    (tmp_path / "runs" / "e" / "f" / "weights").write_bytes(b"0" * 5_000)
    return tmp_path / "runs"


def listing(capsys: Capture, *arguments: str | Path) -> list[list[str]]:
    """The cells of each line, without the header and the time."""
    assert main(["list", "runs", *map(str, arguments)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "status", "metric", "value", "trained", "size", "written"]
    return [re.split(r" {2,}", re.sub(r" +[\d-]{10} [\d:]{5}$", "", line)) for line in lines]


def test_runs_are_listed_with_their_results(listed: Path, capsys: Capture) -> None:
    first, *rest = listing(capsys, listed)
    assert first[:5] == [str(listed / "a"), "completed", "accuracy", "0.5000 ± 0.2500", "1,234"]
    assert [row[:2] for row in rest] == [
        [str(listed / "b c"), "incomplete"],
        [str(listed / "d"), "results.json unreadable"],
        [str(listed / "e" / "f"), "completed"],
    ]
    assert rest[-1][-1] == "5.1 kB"


def test_a_list_of_runs_is_sorted_and_filtered(listed: Path, capsys: Capture) -> None:
    def names(*arguments: str | Path) -> list[str]:
        return [Path(row[0]).name for row in listing(capsys, listed, *arguments)]

    assert names("--sort", "value") == ["a", "f", "b c", "d"]
    assert names("--sort", "value", "--reverse") == ["f", "a", "b c", "d"]
    assert names("--sort", "trained") == ["f", "a", "b c", "d"]
    assert names("--sort", "size", "--reverse")[0] == "f"
    assert names("--status", "completed") == ["a", "f"]
    assert names("--status", "incomplete") == ["b c", "d"]
    assert names("macro_f1") == ["f"] and names("e/") == ["f"]


def test_a_list_of_no_runs_is_an_error(listed: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(listed.parent)
    for arguments, message in (
        (["no/such"], "no folder no/such"),
        (["nothing"], "no runs in runs/ match: 4 there"),
        (["--sort", "price"], "no 'price'"),
    ):
        assert main(["list", "runs", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["list", "recipes", "--sort", "size"]) == 2
    monkeypatch.chdir(listed / "b c")
    assert main(["list", "runs"]) == 2
    assert "no runs in runs/; give the folder to look in" in capsys.readouterr().err


def test_show_prints_the_recipe_and_the_methods_card(capsys: Capture) -> None:
    assert main(["show", "recipe", "quickstart"]) == 0
    assert capsys.readouterr().out == (RECIPES / "quickstart.yaml").read_text(encoding="utf-8")
    for method in options("peft"):
        assert main(["show", "method", method]) == 0
        assert len(capsys.readouterr().out) > 20
    assert main(["show", "method", "lora"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("LoRA: low-rank updates") and "    rank: 8\n" in shown
    assert main(["show", "method", "rosa"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("RoSA: ") and "A stack, with what differs" in shown and "      density: 0.003\n" in shown
    assert "#" not in shown


def test_copy_never_overwrites(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / "quickstart" / "compare.yaml").read_text(encoding="utf-8")
    assert main(["copy", "recipe", "quickstart/compare"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "compare.yaml\n" and "coeft train recipe=compare.yaml" in printed.err
    assert (tmp_path / "compare.yaml").read_text(encoding="utf-8") == text
    (tmp_path / "compare.yaml").write_text("mine")
    assert main(["copy", "recipe", "quickstart/compare"]) == 2
    assert capsys.readouterr().err.startswith("coeft: compare.yaml exists; give another file")
    assert (tmp_path / "compare.yaml").read_text() == "mine"
    assert main(["copy", "recipe", "quickstart", "mein ü.yaml"]) == 0
    assert "coeft train 'recipe=mein ü.yaml'" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert main(["copy", "recipe", "quickstart", "folder"]) == 0 and (tmp_path / "folder" / "quickstart.yaml").is_file()
    assert (
        main(["copy", "recipe", "quickstart", "x.txt"]) == 2
        and main(["copy", "recipe", "quickstart", "no/x.yaml"]) == 2
    )
    capsys.readouterr()
    assert main(["train", "recipe=mein ü.yaml", "--cfg", "job"]) == 0  # a copy runs from where it is


def test_commands_name_functions_that_exist() -> None:
    from importlib import import_module

    for module, function, _ in COMMANDS.values():
        assert callable(getattr(import_module(f"coeft.cli.{module}"), function))

"""Every file of recipes/ without the network: its header, its config, an epoch on small data of its own format."""

import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipe_data import MANY, composed, image_folder, small, vtab_task
from small import coeft, command, results

from coeft.cli.catalogue import RECIPES, recipe_names
from coeft.cli.compose import compose
from coeft.cli.recipe_list import Header, entries, read_header
from coeft.cli.recipes import read_recipe
from coeft.config import TrainConfig, to_dict
from coeft.errors import UserError

NAMES = recipe_names()
DOCS = Path(__file__).parents[2] / "docs"
# VTAB-1k's tasks: classes and images of the full test set, as Zhai et al. 2019 (arXiv:1910.04867) and VPT's table give
NATURAL = {
    "caltech101": (102, 6084), "cifar100": (100, 10000), "dtd": (47, 1880), "oxford_flowers102": (102, 6149),
    "oxford_iiit_pet": (37, 3669), "sun397": (397, 21750), "svhn": (10, 26032),
}  # fmt: skip
SPECIALISED = {
    "diabetic_retinopathy": (5, 42670), "eurosat": (10, 5400), "patch_camelyon": (2, 32768), "resisc45": (45, 6300),
}  # fmt: skip
STRUCTURED = {
    "clevr_count": (8, 15000), "clevr_distance": (6, 15000), "dmlab": (6, 22735), "dsprites_location": (16, 73728),
    "dsprites_orientation": (16, 73728), "kitti": (4, 711), "smallnorb_azimuth": (18, 12150),
    "smallnorb_elevation": (9, 12150),
}  # fmt: skip
TASKS = NATURAL | SPECIALISED | STRUCTURED
TINY_VIT = ["backbone.pretrained=false", "backbone.options={depth: 1, embed_dim: 64, num_heads: 4}"]
QUICK = ["trainer.max_epochs=1", "trainer.progress=false", "trainer.threads=1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying out pictures takes two thirds of such a small run; that they are drawn is tested elsewhere."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr("coeft.plots._save", lambda figure, path: plt.close(figure))


def header(name: str) -> Header:
    return read_header(RECIPES / f"{name}.yaml")


def runs(name: str, whole: bool = False) -> dict[str, TrainConfig]:
    """The runs of a recipe: of a suite its members, each with one seed."""
    composition = composed(name, whole)
    found: dict[str, TrainConfig] = {}
    for member, config in composition.members.items():
        found.setdefault(member.partition("-seed_")[0] if composition.config.seeds else member, config)
    return found or {"": composition.config}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_composes_and_its_header_can_be_read(name: str) -> None:
    found = header(name)
    assert composed(name).config.recipe == name
    assert found.command[:3] == ["coeft", "train", f"recipe={name}"]
    assert found.about.endswith((".", "?")) and len(found.about) > 20
    if found.is_measured:
        assert "torch" in found.fields["Measured"] and any(digit.isdigit() for digit in found.fields["Expected"])
    else:  # then no number of ours may stand in it
        assert found.fields["Measured"].startswith("not measured")
        assert found.fields["Expected"].startswith(("not measured", "depends"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_an_epoch(name: str, tmp_path: Path) -> None:
    """A run, or the first run of a suite; of its other runs each has its model made."""
    from coeft.train import train

    (_, first), *others = runs(name).items()
    ready = small(first, tmp_path / "data")
    run = train(replace(ready, run_dir=str(tmp_path / "run")))
    found = results(run)
    assert found["status"] == "completed" and found["value"] is not None and found["metric"] == first.task.metric
    assert found["trainable_params"] > 0
    check_models(dict(others), ready)


def check_models(others: dict[str, TrainConfig], ready: TrainConfig) -> None:
    """The model of each run can be made on the small backbone of another."""
    from coeft.assemble import assemble, build_backbone

    for name, config in others.items():
        made = replace(config, backbone=ready.backbone)
        built = assemble(made, build_backbone(made), made.task.outputs(["no", "yes"]))
        assert [*built.stack.methods] == [*config.peft], name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if len(read_recipe(name).body.get("suite", {})) > MANY])
def test_all_runs_of_a_large_suite_have_a_model(name: str, tmp_path: Path) -> None:
    found = runs(name, whole=True)
    check_models(found, small(next(iter(found.values())), tmp_path / "data"))


def test_the_command_of_a_header_is_one_that_coeft_takes() -> None:
    """Those whose other words, such as data.shots=16, the first lines of the other tests do not compose."""
    for name in NAMES:
        command = header(name).command
        if len(command) > 3 and not any(word.startswith(("data.root=", "data.path=")) for word in command[3:]):
            assert compose(command[2:])[0].config.recipe == name


def test_a_kind_of_data_that_the_tests_do_not_know_says_where_to_add_it(tmp_path: Path) -> None:
    config = composed("quickstart").config
    strange = replace(config, data=replace(config.data, kind="radio"))
    with pytest.raises(pytest.fail.Exception, match="no small data of kind radio; add a function to MAKERS in tests/r"):
        small(strange, tmp_path / "data")
    other = replace(config, backbone=replace(config.backbone, name="resnet18"))
    with pytest.raises(pytest.fail.Exception, match="how resnet18 is made small; add it to TIMM in tests/recipe_data"):
        small(other, tmp_path / "data")


# The catalogue


def test_the_catalogue_says_what_a_recipe_trains_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert coeft("list", "recipes") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "task", "backbone", "stack", "data", "network"]
    assert [line.split()[0] for line in lines] == NAMES
    rows = {entry.name: entry.row[1:] for entry in entries()}
    images = "1,797 images of 8 x 8 pixels, 10 classes"
    assert rows["quickstart"] == ("classification", "vit_mini", "coeff+lora", images, "no")
    assert rows["ablation/coeff"][2] == "several, 17 runs x 3 seeds"
    assert rows["vtab/all"][:3] == ("classification", "vit_base", "coeff, 19 runs")
    assert rows["vtab/svhn"][3:] == ("800 + 200 and 26,032 images, 10 classes", "weights")  # the folder is typed
    assert rows["fewshot/food101"][2:] == ("coeff x 3 seeds", "16 x 101 and 25,250 images", "weights, data")
    assert rows["glue/stsb"] == ("regression", "roberta_base", "coeff", "5,749 and 1,500 pairs", "weights, data")
    for entry in entries():  # what is read from the files is what Hydra composes
        config = composed(entry.name).config
        assert (entry.task, entry.stack.partition(",")[0].split()[0]) in [
            (config.task.kind, "+".join(config.peft) or "none"),
            (config.task.kind, "several"),
        ]


def test_the_page_of_recipes_is_that_of_their_files() -> None:
    page = runpy.run_path(str(DOCS / "write_recipes.py"))["page"]()
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == page, "run python docs/write_recipes.py"


GOOD = "# What it is.\n#\n# Command:   coeft train recipe=x\n# Data:      none\n# Expected:  not measured\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {}\n", "lacks Command:, Data:, Expected:, Measured:, Paper:"),
        (GOOD + "# Measured:  no\n# Paper:\n", "lacks Paper:"),
        (GOOD + "# Data:      again\n# Measured:  no\n# Paper:     none\n", "the header says Data: twice"),
    ],
)
def test_a_header_that_lacks_something_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "x.yaml")


def test_a_copy_of_a_recipe_that_extends_a_shared_file_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert coeft("copy", "recipe", "vtab/svhn", "mine.yaml") == 0
    text = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text + "seed: 7\n")
    vtab_task(tmp_path / "vtab", "svhn", 10)
    line = ["recipe=./mine.yaml", "data.root=vtab", *TINY_VIT, *QUICK, "run_dir=run"]
    assert coeft("train", *line) == 0
    assert results(tmp_path / "run")["seed"] == 7 and results(tmp_path / "run")["recipe"] == "mine"
    assert coeft("train", "recipe=vtab/_task", "data.root=vtab") == 2
    assert "data.name is required" in capsys.readouterr().err


# VTAB-1k


def plain(config: TrainConfig) -> dict[str, Any]:
    return to_dict(replace(config, recipe=None, run_dir=None, suite={}, suite_groups={}))


def test_the_nineteen_tasks_are_those_of_vtab() -> None:
    assert len(TASKS) == 19 and [name for name in NAMES if name.startswith("vtab/")] == sorted(
        ["vtab/all", *(f"vtab/{task}" for task in TASKS)]
    )
    shared = plain(composed("vtab/cifar100").config)
    own = {"name", "num_classes", "num_test", "hub_name", "hub_config", "hub_columns"}
    for task, (classes, test) in TASKS.items():
        tree = plain(composed(f"vtab/{task}").config)
        assert (tree["data"]["name"], tree["data"]["num_classes"], tree["data"]["num_test"]) == (task, classes, test)
        size = f"800 + 200 and {test:,} images, {classes} classes"
        assert header(f"vtab/{task}").size == size
        assert {**tree, "data": None} == {**shared, "data": None}  # they differ in their data alone
        assert {key for key, value in tree["data"].items() if value != shared["data"][key]} <= own
        hub = tree["data"]["hub_name"] is not None
        assert ("Not verified" if hub else "No data set of the hub is known") in header(f"vtab/{task}").notes


def test_all_of_vtab_are_the_nineteen_recipes_in_three_groups() -> None:
    composition = composed("vtab/all")
    assert set(composition.members) == set(TASKS)
    for task, member in composition.members.items():
        assert plain(member) == plain(composed(f"vtab/{task}").config), task
    groups = {"natural": NATURAL, "specialised": SPECIALISED, "structured": STRUCTURED}
    assert {name: set(tasks) for name, tasks in composition.config.suite_groups.items()} == {
        name: set(tasks) for name, tasks in groups.items()
    }
    papers = header("vtab/all").fields["Paper"]
    assert "none of them measured by us" in papers and "69.78" in papers


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    for task, (classes, _) in TASKS.items():
        vtab_task(tmp_path / "VTAB 1k", task, classes)
    return tmp_path / "VTAB 1k"


SOME = {"natural": ["dtd", "svhn"], "specialised": ["eurosat"], "structured": ["kitti"]}


def test_vtab_is_resumed_and_ends_in_its_table(
    vtab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four of its tasks; all of them are trained above, and slowly below."""
    import coeft.train as training

    suite = composed("vtab/all").config.suite
    chosen = ", ".join(f"{name}: {suite[name]}" for names in SOME.values() for name in names)
    line = ["recipe=vtab/all", f"data.root={vtab}", *TINY_VIT, *QUICK, f"run_dir={tmp_path / 'run'}"]
    original, begun = training.train, []

    def third_stops(cfg: TrainConfig, **kwargs: Any) -> Path:
        begun.append(cfg.data.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(cfg, **kwargs)

    monkeypatch.setattr(training, "train", third_stops)
    assert coeft("train", *line, f"suite={{{chosen}}}", f"suite_groups={SOME}") == 130
    monkeypatch.setattr(training, "train", original)
    stopped = (tmp_path / "run" / "svhn" / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    assert coeft("resume", tmp_path / "run") == 0
    assert (tmp_path / "run" / "svhn" / "results.json").stat().st_mtime_ns == stopped  # not trained again
    check_table(tmp_path / "run", SOME, capsys.readouterr().err)

    from coeft.report.report import comparison_table

    rows = comparison_table([tmp_path / "run"]).rows  # the tasks have other data, so no test between them
    assert [row[0].text for row in rows] == ["dtd", "svhn", "eurosat", "kitti"]
    assert "other data, folds or seeds" in [cell.text for cell in rows[1]]


def test_tasks_that_are_missing_are_all_told_before_the_first_is_trained(
    vtab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(vtab / "kitti")
    (vtab / "dtd" / "test.txt").unlink()
    assert coeft("train", "recipe=vtab/all", f"data.root={vtab}", f"run_dir={tmp_path / 'run'}") == 2
    message = capsys.readouterr().err
    assert "has no folder kitti" in message and f"{vtab / 'dtd' / 'test.txt'}: no such list" in message
    assert not (tmp_path / "run").exists()


def check_table(run: Path, groups: dict[str, list[str]], shown: str) -> None:
    """The means in results.json and in the last table are those of the runs."""
    found = results(run)
    values = {name: results(run / name)["value"] for names in groups.values() for name in names}
    assert list(found["members"]) == list(values)
    means = {group: sum(values[name] for name in names) / len(names) for group, names in groups.items()}
    assert {group: entry["mean"] for group, entry in found["groups"].items()} == pytest.approx(means)
    mean, every = sum(means.values()) / len(means), sum(values.values()) / len(values)
    assert found["over_groups"]["mean"] == pytest.approx(mean) and found["over_runs"]["mean"] == pytest.approx(every)
    table = shown[shown.index("vtab/all: mean accuracy by group") :].splitlines()
    assert [word in table[2] for word in [*groups, f"of all {len(values)}"]] == [True] * (len(groups) + 1)
    printed = [cell.strip() for cell in table[4].split("│")[1:-1]]
    assert printed == [f"{value:.4f}" for value in [*means.values(), mean, every]]
    lines = (run / "groups.csv").read_text().splitlines()
    assert lines[0] == "group,metric,mean,std,groups,runs" and len(lines) == len(groups) + 3


@pytest.mark.slow
def test_all_nineteen_tasks_run_from_the_shell_and_end_in_the_table(vtab: Path, tmp_path: Path) -> None:
    line = ["recipe=vtab/all", f"data.root={vtab}", *TINY_VIT, *QUICK, f"run_dir={tmp_path / 'run'}"]
    done = command("train", *line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run")
    check_table(tmp_path / "run", composed("vtab/all").config.suite_groups, done.stderr)


# Few-shot


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fewshot/")])
def test_few_shot_recipes_train_on_their_shots_alone_with_three_seeds(name: str) -> None:
    composition = composed(name)
    assert list(composition.members) == ["seed_0", "seed_1", "seed_2"]
    for config in composition.members.values():
        assert (
            config.data.shots == 16 and config.cv.val_fraction == 0 and config.data.splits.get("val") in (None, "auto")
        )


def test_few_shots_of_three_seeds_are_three_runs_with_a_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("fewshot/fgvc_aircraft").config
    image_folder(config, tmp_path / "aircraft")
    line = ["recipe=fewshot/fgvc_aircraft", f"data.root={tmp_path / 'aircraft'}", "data.shots=4", *TINY_VIT, *QUICK]
    assert coeft("train", *line, f"run_dir={tmp_path / 'run'}") == 0
    found = results(tmp_path / "run")
    assert list(found["members"]) == ["seed_0", "seed_1", "seed_2"] and found["over_seeds"]["run"]["seeds"] == 3
    for seed in range(3):
        [row] = results(tmp_path / "run" / f"seed_{seed}")["folds"]
        assert (row["n_train"], row["n_val"], row["n_test"]) == (8, 0, 4)
    capsys.readouterr()
    line[2] = "data.shots=17"
    assert coeft("train", *line, "seeds=[0]", f"run_dir={tmp_path / 'other'}") == 2
    assert "data.shots=17 is more than some classes have to train on: ape has 16, bee has 16" in capsys.readouterr().err

"""Reading runs, comparing and tables, on run directories that are written by hand."""

import csv
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from coeft.cli.compose import compose
from coeft.config import TrainConfig, to_yaml
from coeft.errors import UserError
from coeft.report import figures
from coeft.report.coefficients import hull_distance, moved, negative_mass, negative_share
from coeft.report.page import lead, render, write
from coeft.report.read import collect, differing
from coeft.report.report import Report, build, comparison_table, export_figures
from coeft.report.samples import read, rows, to_csv
from coeft.report.statistics import reliability
from coeft.report.tables import Cell, Column, Table, to_latex, to_markdown
from coeft.report.tables import to_csv as table_csv

SCORES = {
    "none": [0.80, 0.82, 0.81, 0.79, 0.83],
    "coeff": [0.84, 0.85, 0.86, 0.82, 0.84],
    "lora": [0.95, 0.96, 0.94, 0.93, 0.97],
}


@cache
def config(*overrides: str) -> TrainConfig:
    return compose(["recipe=quickstart", *overrides])[0].config


def make(
    folder: Path, cfg: TrainConfig, scores: list[float], *, fingerprint: str = "digits", trained: int = 100, **more: Any
) -> Path:
    """A complete run with these scores of its folds, or with one score on a test split."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    folds = []
    for index, value in enumerate(scores):
        row = {"fold": index, "value": value, "best_epoch": 3, "n_train": 300, "n_val": 20, "n_test": 80}
        folds.append(row)
        place = folder / f"fold_{index}" if cfg.cv.folds > 1 else folder
        place.mkdir(exist_ok=True)
        outcome = {"row": row, "validation": value + 0.01, "extras": {}, "fit_s": 15.0, "samples_seen": 1200}
        counts = {"trainable": trained, "adapter": trained - 10, "total": 1000}
        (place / "fold.json").write_text(json.dumps({**outcome, "counts": counts}))
    mean = sum(scores) / len(scores)
    results = {
        "recipe": cfg.recipe, "status": "completed", "metric": "accuracy", "value": mean, "mean": mean, "std": None,
        "folds": folds, "trainable_params": trained, "adapter_params": trained - 10, "total_params": 1000,
        "wall_s": 75.0, "samples_per_s": 1234.5, "peak_rss_mb": 800.2, "peak_gpu_mb": None, "seed": cfg.seed,
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"threads": 1, "data_fingerprint": fingerprint}))
    (folder / "results.json").write_text(json.dumps(results | more))
    lines = [f"{f},{e},{10 * e},{1 / (e + 1)},1e-3,0.5,{0.1 * e}" for f in range(len(scores)) for e in range(4)]
    (folder / "metrics.csv").write_text("\n".join(["fold,epoch,step,train/loss,lr,val/loss,val/accuracy", *lines]))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stacks on the same five folds, and a run that did not complete."""
    folder = tmp_path_factory.mktemp("made") / "runs"
    for trained, (name, scores) in zip((100, 150, 900), SCORES.items(), strict=True):
        make(folder / name, config(f"peft={name}"), scores, trained=trained)
    half = folder / "half"
    half.mkdir()
    (half / "config.yaml").write_text(to_yaml(config("peft=bitfit")))
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of them for one test."""
    return shutil.copytree(made, tmp_path / "runs")


@pytest.fixture(scope="module")
def plain(made: Path) -> Report:
    """Their report without figures, which take the time."""
    return without_figures(build([made], samples=False))


def without_figures(report: Report) -> Report:
    for detail in report.details:
        detail.figures.clear()
    return replace(report, overview=[], learnt=[])


def values(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table_csv(table))))


def test_the_comparison_holds_the_corrected_test_of_every_setting(runs: Path) -> None:
    none, coeff, lora = values(comparison_table([runs / name for name in SCORES]))
    difference = np.subtract(SCORES["coeff"], SCORES["none"])
    t = difference.mean() / np.sqrt((1 / 5 + 80 / 320) * difference.var(ddof=1))
    p = 2 * stats.t.sf(abs(t), 4)
    assert float(coeff["t"]) == pytest.approx(t) and float(coeff["p"]) == pytest.approx(p)
    assert float(coeff["p_holm"]) == pytest.approx(max(p, 2 * float(lora["p"])))
    assert float(lora["p_holm"]) == pytest.approx(2 * float(lora["p"]))
    assert none["difference"] == "0" and none["p"] == ""
    assert float(lora["mean"]) == pytest.approx(0.95) and float(lora["sd"]) == pytest.approx(
        np.std(SCORES["lora"], ddof=1)
    )


def test_the_baseline_can_be_chosen(runs: Path) -> None:
    table = comparison_table([runs], baseline="lora")
    assert [row["setting"] for row in values(table) if row["p"] == ""] == ["lora"]
    with pytest.raises(UserError, match="no setting 'lara'; there are coeff, lora, none"):
        comparison_table([runs], baseline="lara")


def test_runs_on_other_folds_or_data_are_not_paired(runs: Path, tmp_path: Path) -> None:
    make(tmp_path / "more" / "seed", config("peft=lora", "seed=7"), SCORES["lora"])
    make(tmp_path / "more" / "data", config("peft=lora"), SCORES["lora"], fingerprint="others")
    make(tmp_path / "more" / "folds", config("peft=lora", "cv.folds=3"), SCORES["lora"][:3])
    first, *rest = values(comparison_table([runs / "none", tmp_path / "more"]))
    assert first["setting"] == "runs/none"
    assert len(rest) == 3 and all(row["p"] == "" and row["difference"] == "" for row in rest)


def test_runs_that_differ_in_the_seed_alone_are_one_setting(tmp_path: Path) -> None:
    for seed in (0, 1):
        for name in ("none", "lora"):
            scores = [score + 0.001 * seed for score in SCORES[name]]
            make(tmp_path / f"{name}-seed_{seed}", config(f"peft={name}", f"seed={seed}"), scores)
    found = collect([tmp_path]).settings
    assert [(setting.name, len(setting.scores)) for setting in found] == [("lora", 10), ("none", 10)]
    assert [setting.name for setting in collect([make_seeds(tmp_path / "suite")]).settings] == ["suite"]
    test, _ = found[0].against(found[1])
    assert test is not None and test.count == 10
    difference = np.tile(np.subtract(SCORES["lora"], SCORES["none"]), 2)
    assert test.t == pytest.approx(difference.mean() / np.sqrt((1 / 10 + 80 / 320) * difference.var(ddof=1)))


def make_seeds(folder: Path) -> Path:
    for seed in (0, 1):
        make(folder / f"seed_{seed}", config(f"seed={seed}"), SCORES["none"])
    return folder


def test_the_same_run_twice_does_not_count_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, config(), SCORES["none"])
    assert [len(setting.scores) for setting in collect([tmp_path]).settings] == [5, 5]
    assert len(collect([tmp_path / "a", tmp_path / "a", tmp_path]).settings) == 2


def test_single_scores_have_no_interval_and_no_test(tmp_path: Path) -> None:
    for name in ("none", "lora"):
        make(tmp_path / name, config(f"peft={name}", "cv.folds=0"), SCORES[name][:1])
    table = comparison_table([tmp_path])
    assert [(row["sd"], row["ci_low"], row["p"]) for row in values(table)] == [("", "", "")] * 2
    assert float(values(table)[1]["difference"]) == pytest.approx(0.8 - 0.95)
    assert any("A single score" in note for note in table.notes)


def test_trials_of_a_sweep_are_scored_on_validation(tmp_path: Path) -> None:
    for number, name in enumerate(("none", "lora")):
        make(tmp_path / "sweep" / "trials" / f"{number:04}", config(f"peft={name}"), SCORES[name])
    (tmp_path / "sweep" / "sweep.yaml").write_text("name: x\n")
    best = {"number": 1, "run_dir": "trials/0001", "values": {}, "params": {"peft": ["lora"]}}
    summary = {"status": "completed", "metric": "accuracy", "trials": {"complete": 2}, "best": best, "heldout": 0.9512}
    (tmp_path / "sweep" / "results.json").write_text(json.dumps(summary))
    settings = collect([tmp_path / "sweep"]).settings
    assert [setting.scored_on for setting in settings] == ["validation"] * 2
    assert list(settings[1].scores.values()) == pytest.approx([score + 0.01 for score in SCORES["lora"]])
    page = render(without_figures(build([tmp_path / "sweep"], samples=False)))
    assert "accuracy 0.9512" in page  # of the best trial, which the sweep measured once
    assert "0.8100" not in page  # the held-out mean of the other one
    assert [s.scored_on for s in collect([tmp_path / "sweep" / "trials" / "0000"]).settings] == ["validation"]


def test_a_suite_is_its_runs_in_its_order(runs: Path) -> None:
    (runs / "config.yaml").write_text(to_yaml(config()))
    (runs / ".members").mkdir()
    for number, name in enumerate(("none", "lora", "coeff", "half")):
        (runs / ".members" / f"{number:03}_{name}.yaml").touch()
    found = collect([runs])
    assert [setting.name for setting in found.settings] == ["none", "lora", "coeff"]
    assert [each.reason.partition(";")[0] for each in found.incomplete] == [
        "the suite did not complete",
        "the run did not complete",
    ]


def grouped(folder: Path, values: dict[str, float]) -> Path:
    """A suite whose runs are in two groups."""
    from coeft.suite import over_groups

    members = {name: {"metric": "accuracy", "mean": value} for name, value in values.items()}
    groups = {"natural": ["none", "coeff"], "other": ["lora"]}
    for name, value in values.items():
        make(folder / name, config(f"peft={name}", "cv.folds=0"), [value])
    (folder / "config.yaml").write_text(to_yaml(config()))
    results = {"recipe": "x", "status": "completed", "members": members, **over_groups(members, groups)}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_suites_with_groups_are_rows_of_one_table(tmp_path: Path) -> None:
    one = grouped(tmp_path / "one", {"none": 0.2, "coeff": 0.4, "lora": 0.9})
    other = grouped(tmp_path / "other", {"none": 0.3, "coeff": 0.3, "lora": 0.5})
    report = without_figures(build([one, other], samples=False))
    [table] = report.groups
    first, second = values(table)
    assert list(first) == ["suite", "none", "coeff", "lora", "mean_natural", "mean_other", "mean_groups", "mean_runs"]
    assert list(first.values()) == ["one", "0.2", "0.4", "0.9", "0.3", "0.9", "0.6", "0.5"]
    assert (second["suite"], float(second["mean_groups"])) == ("other", pytest.approx(0.4))
    page = render(report)
    assert 'id="table-groups_0"' in page and "mean of natural" in page and 'href="#groups"' in page
    found = json.loads((other / "results.json").read_text())
    found["groups"]["natural"]["mean"] = "high"
    (other / "results.json").write_text(json.dumps(found))
    damaged = collect([one, other])
    assert [Path(path).name for path in damaged.suites] == ["one"]
    assert "must hold a mean and an std each" in damaged.incomplete[0].reason


def test_nothing_complete_is_an_error_that_lists_what_there_is(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete run.*\n.*half: the run did not complete"):
        collect([runs / "half"])
    with pytest.raises(UserError, match="no such run directory"):
        collect([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run in this folder"):
        collect([tmp_path / "empty"])


def test_a_damaged_run_is_left_out_with_its_reason(runs: Path) -> None:
    (runs / "lora" / "results.json").write_text('{"status": "completed"}')
    (runs / "coeff" / "config.yaml").write_text("sead: 7\n")
    found = collect([runs])
    assert [setting.name for setting in found.settings] == ["none"]
    assert {each.path.name for each in found.incomplete} == {"lora", "coeff", "half"}


def test_the_settings_that_differ_are_named(runs: Path) -> None:
    found = differing(collect([runs / name for name in SCORES]).settings)
    assert found["stack"] == ["head only", "coeff", "lora"]
    assert found["peft.lora.rank"] == ["–", "–", "8"]
    assert not [key for key in found if not key.startswith("peft.") and key != "stack"]


SMALL = Table(
    key="small",
    title="Small",
    columns=[
        Column(key="name", title="na|me"),
        Column(key="score", title="score, %", numeric=True),
        Column(key="", title="both", numeric=True, exported=False),
        Column(key="exact", title="exact", numeric=True, shown=False),
    ],
    rows=[
        [Cell.of("a_b|c"), Cell("−0.50", -0.5), Cell("0.5 ± 0.1", 0.5), Cell("0.3", 1 / 3)],
        [Cell.of("=1+1"), Cell("–"), Cell("< 0.001", 0.0001), Cell("–")],
    ],
)


def test_markdown() -> None:
    assert to_markdown(SMALL) == (
        "| na\\|me | score, % | both |\n"
        "| --- | ---: | ---: |\n"
        "| a_b\\|c | −0.50 | 0.5 ± 0.1 |\n"
        "| =1+1 | – | < 0.001 |\n"
    )


def test_csv_has_numbers_in_full_and_no_formulas() -> None:
    assert table_csv(SMALL) == "name,score,exact\na_b|c,-0.5,0.3333333333\n'=1+1,,\n"


def test_latex() -> None:
    assert to_latex(SMALL) == (
        "\\begin{tabular}{lrr}\n\\toprule\n"
        "na|me & score, \\% & both \\\\\n\\midrule\n"
        "a\\_b|c & $-$0.50 & 0.5 $\\pm$ 0.1 \\\\\n"
        "=1+1 & -- & $<$ 0.001 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_figures_are_png_and_svg_files(runs: Path, tmp_path: Path) -> None:
    files = export_figures([runs / "none", runs / "lora"], tmp_path / "figures")
    names = {path.name for path in files}
    assert {"scores.png", "scores.svg", "parameters.svg", "curves-lora.png"} <= names
    for path in files:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_an_inline_figure_keeps_its_numbers_and_takes_the_colours_of_the_page(runs: Path) -> None:
    drawn = figures.scores(collect([runs]).settings)
    svg, width = drawn.inline()
    assert ">0.825<" in svg  # ticks are not rounded with the coordinates
    assert figures.INK not in svg and "var(--ink)" in svg and "http" not in svg
    assert 300 < width < 700


def test_names_of_any_kind_do_no_harm(tmp_path: Path) -> None:
    name = "$x^2$ <script>alert(1)</script> 猫 \"&'"
    run = make(tmp_path / "runs" / name, config("peft=none"), SCORES["none"])
    (run / "metrics.csv").unlink()
    make(tmp_path / "runs" / "lora", config("peft=lora"), SCORES["lora"])
    (tmp_path / "runs" / "lora" / "metrics.csv").unlink()
    page = render(build([tmp_path / "runs"], samples=False))
    assert "No learning curves: metrics.csv is missing." in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_a_page_replaces_a_page_and_nothing_else(plain: Report, tmp_path: Path) -> None:
    write(plain, tmp_path / "report.html")
    write(plain, tmp_path / "report.html")
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match="is no report"):
        write(plain, tmp_path / "notes.html")
    with pytest.raises(UserError, match="no folder"):
        write(plain, tmp_path / "no" / "report.html")


def test_the_lead_names_the_best_setting(plain: Report) -> None:
    assert lead(plain)[1] == (
        "Best mean: lora with accuracy 0.9500 ± 0.0158 on the held-out folds, 900 parameters trained."
    )


def test_predictions_come_back_as_they_were_written(tmp_path: Path) -> None:
    shares = np.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]])
    found = rows(shares, np.array([0, 2]), ["a,b", "ü"], ["x", "y", "z"], 3)
    assert [(row.prediction, row.confidence, row.label_probability) for row in found] == [
        ("x", 0.7, 0.7),
        ("y", 0.4, 0.3),
    ]
    (tmp_path / "predictions.csv").write_text(to_csv(found), encoding="utf-8")
    assert read(tmp_path / "predictions.csv") == found
    (tmp_path / "predictions.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match="delete it to predict again"):
        read(tmp_path / "predictions.csv")


def test_measures_of_alpha_by_hand() -> None:
    none = np.zeros((2, 2))
    assert (moved(none), negative_share(none), hull_distance(none)) == (0, 0, 0)
    # I + alpha = [[1.5, -0.5], [0.5, 0.5]]: the first row is nearest to (1, 0), the second is a convex combination
    alpha = np.array([[0.5, -0.5], [0.5, -0.5]])
    assert moved(alpha) == pytest.approx(1.0)
    assert negative_share(alpha) == pytest.approx(0.5 / 3)
    assert hull_distance(alpha) == pytest.approx(np.sqrt(0.5) / 2)
    # rows that do not sum to one: (1.3, 0.3) is nearest to (1, 0), both entries 0.3 too large
    assert hull_distance(np.full((2, 2), 0.3)) == pytest.approx(np.sqrt(2 * 0.3**2))


def test_the_distance_from_the_hull_is_that_of_a_search_over_the_simplex() -> None:
    row = np.array([0.9, -0.4, 0.2])
    steps = np.linspace(0, 1, 201)
    points = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-12])
    nearest = np.linalg.norm(points - row, axis=1).min()
    alpha = np.tile(row, (3, 1)) - np.eye(3)
    assert hull_distance(alpha) == pytest.approx(nearest, abs=2e-3)


def test_negative_mass_by_hand() -> None:
    maps = np.array([[[0.5, 0.5], [1.0, 0.0]], [[1.5, -0.5], [0.0, 1.0]]])
    assert negative_mass(maps) == pytest.approx([0.0, 0.5 / 3])


def test_a_reliability_diagram_of_few_predictions() -> None:
    bins, error = reliability([0.9, 0.8], [True, False])
    assert "0.4500" in figures.reliability(bins, error, "x").caption  # (|1 - 0.9| + |0 - 0.8|) / 2


def test_the_numbers_of_a_confusion_matrix_have_colours_of_their_own() -> None:
    """Their cells are as light in the dark theme, where other text is white."""
    svg, _ = figures.confusion(np.array([[51, 33], [12, 74]]), ["cat", "dog"], "x").inline()
    for number, colour in (("51", "#ffffff"), ("33", "#111111"), ("12", "#111111"), ("74", "#ffffff")):
        [style] = re.findall(rf'<text style="([^"]*)"[^>]*>{number}</text>', svg)
        assert f"fill: {colour}" in style and "DejaVu" not in style


def test_a_confusion_matrix_names_its_worst_mistake() -> None:
    drawn = figures.confusion(np.array([[5, 3], [1, 7]]), ["cat", "dog"], "x")
    assert "cat taken for dog, 3 times" in drawn.caption and "2 classes" in drawn.alt
    assert "No mistake" in figures.confusion(np.diag([5, 7]), ["cat", "dog"], "x").caption

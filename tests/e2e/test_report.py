"""coeft report over a small comparison: the page, its numbers, and how it behaves in a browser."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small import coeft, results, trained

STACKS = {"none": "peft=none", "coeff": "peft=[coeff]", "coeff_lora": "peft=[coeff,lora]"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stacks on the same two folds of some digits, and a run that was interrupted."""
    folder = tmp_path_factory.mktemp("comparison") / "runs"
    for name, stack in STACKS.items():
        trained(folder / name, stack, "cv.folds=2", "optim.lr=1e-2")
    half = folder / "half"
    half.mkdir()
    shutil.copy(folder / "none" / "config.yaml", half)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    """The report of all of them."""
    out = runs.parent / "report.html"
    assert coeft("report", runs, "--out", out, "--baseline", "none") == 0
    return out


class Seen(HTMLParser):
    """What a page consists of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_page_is_whole_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|@import|//cdn", text)
    seen = Seen(page)
    assert not seen.open
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a[key] for _, a in seen.tags for key in ("href", "xlink:href") if key in a]
    assert targets and all(
        target and target[0] == "#" and target[1:] in ids for target in targets if target[:5] != "data:"
    )
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert len(text) < 1_000_000


def test_the_page_can_be_read_without_seeing_it(page: Path) -> None:
    seen = Seen(page)
    assert seen.all("html")[0]["lang"] == "en"
    assert all(attributes.get("scope") in ("col", "row") for attributes in seen.all("th"))
    assert len(seen.all("svg")) > 8
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in seen.all("svg"))
    assert seen.all("img") and all(attributes.get("alt") for attributes in seen.all("img"))
    headings = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))


def test_the_page_holds_every_section(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("comparison", "classes", "coeff", "runs", "settings"):
        assert f'<h2 id="{part}">' in text
    for figure in (
        "Learning curves",
        "Confusion matrix",
        "Reliability",
        "Learnt coefficients α",
        "Attention before and",
    ):
        assert figure in text
    assert "half" in text and "the run did not complete" in text
    assert "No reliability" not in text and "No attention" not in text


def test_the_table_holds_the_numbers_of_the_runs(runs: Path, capsys: Capture) -> None:
    assert coeft("report", runs, "--format", "csv", "--baseline", "none") == 0
    rows = {row["setting"]: row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert set(rows) == set(STACKS)
    for name, row in rows.items():
        found = results(runs / name)
        assert float(row["mean"]) == pytest.approx(found["mean"]) and float(row["sd"]) == pytest.approx(found["std"])
        assert int(row["trainable_params"]) == found["trainable_params"]


def test_kept_predictions_are_those_that_were_scored(page: Path, runs: Path) -> None:
    with (runs / "coeff" / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for fold in results(runs / "coeff")["folds"]:
        mine = [row for row in rows if int(row["fold"]) == fold["fold"]]
        assert len(mine) == fold["n_test"]
        assert sum(row["label"] == row["prediction"] for row in mine) / len(mine) == pytest.approx(
            fold["value"], abs=1e-6
        )


def test_without_its_data_a_run_is_reported_without_pictures_of_it(page: Path, runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "coeff", tmp_path / "run")
    (run / "predictions.csv").unlink()
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(facts | {"data_fingerprint": "other"}))
    assert coeft("report", run, "--out", tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No reliability diagram and no hardest examples: the data is not what the run was trained on." in text
    assert "No attention maps: the data is not what the run was trained on." in text
    assert "Learnt coefficients α" in text and "Confusion matrix" in text


def test_before_and_after_differ_by_the_learnt_matrix(runs: Path) -> None:
    from coeft.report.coefficients import learnt, negative_mass
    from coeft.report.read import collect
    from coeft.report.samples import Opened, mixed

    [setting] = collect([runs / "coeff"]).settings
    opened = Opened(setting.records[0])
    shown = mixed(opened, [(1, head) for head in range(4)])
    alpha = learnt(setting)[0].alphas["blocks.1.attn"]
    before = [before for _, before, _ in shown.maps]
    for head, (name, _, after) in enumerate(shown.maps):
        expected = before[head] + sum(alpha[head, other] * before[other] for other in range(4))
        assert name == f"blocks.1, head {head}" and after.shape == (4, 4)
        assert after == pytest.approx(expected, abs=1e-5)
    assert list(shown.negative) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(0 <= share < 0.5 for share in shown.negative.values())
    assert negative_mass(after[None]).shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run directory"),
        (["half"], "no complete run to report on"),
        (["none", "--baseline", "lora"], "--baseline: no setting 'lora'"),
        (["none", "--out", "none"], "is a folder; give a file"),
        (["none", "--format", "pdf"], "no 'pdf'"),
        (["none", "--heads", "3"], "give layers and heads, such as 5:0,5:3"),
        (["coeff", "--heads", "9:0"], "there are 2 layers with 4 heads"),
    ],
)
def test_wrong_input_is_told(
    runs: Path, arguments: list[str], message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert coeft("report", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (runs / "report.html").exists()


def test_the_path_of_the_page_is_the_last_line(
    runs: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert coeft("report", runs / "none", runs / "half", "--no-samples") == 0
    shown = capsys.readouterr()
    assert shown.out == "report.html\n" and (tmp_path / "report.html").is_file()
    assert "left out" in shown.err and "half: the run did not complete" in shown.err


@pytest.fixture(scope="module")
def browser() -> Any:
    """Chromium without a window; nothing may leave the machine."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Any, page: Path, **options: Any) -> tuple[Any, list[str]]:
    """A tab with the page, and what it should never have: messages of the console, requests to elsewhere."""
    tab = browser.new_context(**options).new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: None if request.url[:5] in ("file:", "data:") else wrong.append(request.url))
    tab.goto(page.as_uri())
    return tab, wrong


def test_in_a_browser_a_click_sorts_and_the_theme_can_be_switched(browser: Any, page: Path, tmp_path: Path) -> None:
    tab, wrong = opened(browser, page, viewport={"width": 1200, "height": 800}, color_scheme="light")
    names = tab.locator("#table-comparison tbody th")
    assert names.all_inner_texts() == ["coeff", "coeff_lora", "none"]
    head = tab.locator("#table-comparison thead th", has_text="trained parameters")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert names.all_inner_texts() == ["coeff_lora", "coeff", "none"]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names.all_inner_texts() == ["none", "coeff", "coeff_lora"]

    def ground() -> str:
        return tab.evaluate("getComputedStyle(document.body).backgroundColor")

    light = ground()
    tab.screenshot(path=tmp_path / "light.png")
    tab.get_by_role("button", name="Dark theme").click()
    assert ground() != light and tab.get_by_role("button", name="Light theme").is_visible()
    tab.screenshot(path=tmp_path / "dark.png")
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()
    tab.get_by_role("button", name="Copy as Markdown").click()
    tab.wait_for_function("document.getElementById('copied').textContent !== ''")
    assert not wrong


def test_in_a_browser_the_page_follows_the_system_and_fits_a_phone(browser: Any, page: Path) -> None:
    phone, wrong = opened(browser, page, viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    assert phone.get_by_role("button", name="Light theme").is_visible()
    for summary in phone.locator("summary").all():
        if summary.evaluate("each => !each.parentElement.open"):
            summary.click()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    assert phone.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert not wrong

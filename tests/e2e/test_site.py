"""The documentation site builds without a warning, and asks nothing of any other machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASKS = re.compile(r"""<(?:link|script|img|iframe|source)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//([^"'/]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    made = {"method-cards", "recipe-files", "contributing"}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} | made
    assert pages == {folder.name for folder in site.iterdir() if (folder / "index.html").is_file()}


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        asked = set(ASKS.findall(page.read_text(encoding="utf-8")))
        assert not asked, f"{page.relative_to(site)} loads from {asked}"


def test_the_reference_shows_signatures_and_arguments(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text(encoding="utf-8"))
    for word in ("coeff_attention", "enable_gqa", "load_adapter", "is_causal", "val_fraction"):
        assert word in text


def test_methods_and_recipes_are_all_listed(site: Path) -> None:
    from coeft.cli.catalogue import options, recipe_names

    methods = (site / "method-cards" / "index.html").read_text(encoding="utf-8")
    recipes = (site / "recipes" / "index.html").read_text(encoding="utf-8")
    files = (site / "recipe-files" / "index.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in methods for name in options("peft") if name != "none")
    assert all(f">{name}<" in recipes and f">{name}<" in files for name in recipe_names())

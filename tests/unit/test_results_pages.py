"""The tables of measured suites stand in the pages as their figures say."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_are_those_of_the_kept_figures() -> None:
    for path, text in runpy.run_path(str(DOCS / "write_results.py"))["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"run python docs/write_results.py, {path.name} differs"

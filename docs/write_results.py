"""Keep the figures of suites in docs/results/, and write the tables of the pages from them.

    python docs/write_results.py                     writes the tables anew
    python docs/write_results.py --keep RUN NAME     first reduces a finished suite to docs/results/NAME.json

A table stands in its page between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).parent
KEPT = DOCS / "results"
Members = Mapping[str, Mapping[str, Any]]
Rows = Callable[[Members], list[list[str]]]

# Accuracy without and with coeff in the paper (arXiv:2503.18337): VTAB-1k with ViT-B/16, and VL-BART's four tasks.
PAPER = {
    "none": "52.94 → 69.78", "fact": "73.04 → 73.64", "snell": "74.17 → 74.70", "lora": "VL-BART: 76.5 → 77.1",
    "dora": "VL-BART: 77.4 → 77.7",
}  # fmt: skip
STARTS = {"coeff": ("residual", "73.49"), "start_identity": ("identity", "61.57"), "start_random": ("random", "44.28")}
DROPOUT = {"0": "75.1", "0.1": "77.3", "0.2": "77.7", "0.4": "72.3"}


def keep(run: Path, name: str) -> None:
    """Reduce a suite to what the tables say: the folds' values of each member over its seeds, and its parameters.

    Raises:
        SystemExit: a member failed or the suite is not complete.
    """
    suite = json.loads((run / "results.json").read_text())
    found: dict[str, Any] = {}
    for member, row in suite["members"].items():
        results = json.loads((run / member / "results.json").read_text())
        kept = found.setdefault(re.sub(r"-seed_\d+$", "", member), {"parameters": row["adapter_params"], "folds": []})
        kept["folds"] += [round(fold["value"], 6) for fold in results["folds"]]
    environment = json.loads((run / next(iter(suite["members"])) / "environment.json").read_text())
    versions = {key: environment["versions"][key] for key in ("coeft", "torch", "timm", "transformers")}
    KEPT.mkdir(exist_ok=True)
    content = {"recipe": suite["recipe"], "metric": row["metric"], "versions": versions, "members": found}
    (KEPT / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def difference(one: list[float], other: list[float]) -> str:
    """Mean ± standard deviation of the differences, fold by fold."""
    paired = [b - a for a, b in zip(one, other, strict=True)]
    middle = round(mean(paired), 4) + 0.0  # no minus before a zero
    return f"{middle:+.4f} ± {stdev(paired):.4f}".replace("-", "−")


def with_and_without(members: Members) -> list[list[str]]:
    """Each method of the paper without and with coeff."""
    rows = [["method", "parameters", "without coeff", "with coeff", "difference", "the paper's"]]
    for name in ("none", "fact", "snell", "lora", "dora", "ssf"):
        one, both = members[name], members["coeff" if name == "none" else f"coeff_{name}"]
        rows.append([
            name, f"{one['parameters']:,}", spread(one["folds"]), spread(both["folds"]),
            difference(one["folds"], both["folds"]), PAPER.get(name, ""),
        ])  # fmt: skip
    return rows


def zoo(members: Members) -> list[list[str]]:
    """A row per method, the most accurate first."""
    costs = json.loads((KEPT / "zoo_steps.json").read_text())["members"]
    titles = ["method", "parameters", "alone", "with coeff", "difference", "step", "kept", "merges"]
    rows = [titles]
    for name in sorted((each for each in members if not each.startswith("coeff_")), key=_worst_last(members)):
        pair = [name, "coeff" if name == "none" else f"coeff_{name}"]
        there = [each for each in pair if each in members]
        folds = [members[each]["folds"] for each in there]
        merges = ("yes" if costs[name]["merges"] else "no") if members[name]["parameters"] else ""
        rows.append([
            name, f"{members[name]['parameters']:,}", spread(folds[0]), spread(folds[1]) if folds[1:] else "",
            difference(*folds) if folds[1:] else "", " / ".join(f"{costs[each]['step']:.2f}" for each in there),
            " / ".join(f"{costs[each]['kept_mib']:.1f}" for each in there), merges,
        ])  # fmt: skip
    return rows


def _worst_last(members: Members) -> Callable[[str], float]:
    return lambda name: -mean(members[name]["folds"])


def variants(title: str, named: Mapping[str, tuple[str, str]]) -> Rows:
    """A table of variants of coeff; `named` gives each member's own name and the paper's figure."""

    def rows(members: Members) -> list[list[str]]:
        return [[title, "accuracy", "the paper's"]] + [
            [text, spread(members[name]["folds"]), paper] for name, (text, paper) in named.items()
        ]

    return rows


def dropouts(default: str) -> dict[str, tuple[str, str]]:
    """The variants of dropout, of which the suite's default is the member coeff."""
    return {"coeff" if text == default else f"dropout_{text}": (text, paper) for text, paper in DROPOUT.items()}


COEFF = "coeff-tuning.md"
TABLES: dict[str, tuple[str, str, Rows]] = {
    "ablation": (COEFF, "ablation", with_and_without),
    "starts": (COEFF, "ablation", variants("start of α", STARTS)),
    "dropout": (COEFF, "ablation", variants("dropout on α", dropouts("0.2"))),
    "ablation_text": (COEFF, "ablation_text", with_and_without),
    "starts_text": (COEFF, "ablation_text", variants("start of α", STARTS)),
    "zoo": ("methods.md", "zoo", zoo),
    "dropout_text": (COEFF, "ablation_text", variants("dropout on α", dropouts("0"))),
}
"""Name of a table -> its page, the file of its figures, and its rows, the titles first."""


def markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def written(page: str, text: str) -> str:
    """The page's text with every table of it written anew."""
    for name, (where, figures, rows) in TABLES.items():
        if where == page:
            table = markdown(rows(json.loads((KEPT / f"{figures}.json").read_text())["members"]))
            pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
            text, count = re.subn(pattern, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.S)  # noqa: B023
            if count != 1:
                raise SystemExit(f"{page} has {count} places for the table {name}")
    return text


def pages() -> dict[Path, str]:
    """Every page with tables -> its text with them written anew."""
    return {
        DOCS / page: written(page, (DOCS / page).read_text(encoding="utf-8"))
        for page in dict.fromkeys(page for page, _, _ in TABLES.values())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, metavar=("RUN", "NAME"))
    arguments = parser.parse_args()
    if arguments.keep:
        keep(Path(arguments.keep[0]), arguments.keep[1])
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

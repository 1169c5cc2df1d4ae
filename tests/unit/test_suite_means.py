"""Means of a suite's runs by group and over seeds, by hand."""

import io
from typing import Any

import pytest

from coeft.suite import over_groups
from coeft.tables import print_suite


def members(values: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "metric": "accuracy",
            "mean": value,
            "std": None,
            "trainable_params": 3,
            "adapter_params": 1,
            "wall_s": 2,
        }
        for name, value in values.items()
    }


GROUPS = {"natural": ["a", "b"], "structured": ["c"]}


def test_the_mean_of_groups_counts_each_group_once() -> None:
    found = over_groups(members({"a": 0.2, "b": 0.4, "c": 0.9, "d": 0.0}), GROUPS)
    assert found["groups"]["natural"] == {
        "metric": "accuracy", "mean": pytest.approx(0.3), "std": None, "runs": ["a", "b"],
    }  # fmt: skip
    assert found["groups"]["structured"]["mean"] == 0.9
    over = {"metric": "accuracy", "mean": pytest.approx((0.3 + 0.9) / 2), "std": None, "groups": 2}
    assert found["over_groups"] == over
    assert found["over_runs"] == {"metric": "accuracy", "mean": pytest.approx(0.5), "std": None, "runs": 3}


def test_deviations_are_those_of_the_seeds_own_means() -> None:
    values = {"a-seed_0": 0.1, "a-seed_7": 0.5, "b-seed_0": 0.3, "b-seed_7": 0.3, "c-seed_0": 0.6, "c-seed_7": 0.2}
    found = over_groups(members(values), GROUPS, [0, 7])
    natural, structured = found["groups"]["natural"], found["groups"]["structured"]
    assert natural["mean"] == pytest.approx(0.3) and natural["std"] == pytest.approx(0.2 / 2**0.5)
    assert structured["mean"] == pytest.approx(0.4) and structured["std"] == pytest.approx(0.4 / 2**0.5)
    assert found["over_groups"]["mean"] == pytest.approx(0.35)  # of 0.4 and 0.3
    assert found["over_groups"]["std"] == pytest.approx(0.1 / 2**0.5)
    assert found["over_runs"]["mean"] == pytest.approx(1 / 3) and found["over_runs"]["std"] == pytest.approx(
        0, abs=1e-9
    )


def test_a_run_without_a_value_leaves_its_group_without_a_mean() -> None:
    found = over_groups(members({"a": None, "b": 0.4, "c": 0.9}), GROUPS)
    assert found["groups"]["natural"]["mean"] is None and found["groups"]["structured"]["mean"] == 0.9
    assert found["over_groups"]["mean"] is None


def test_the_table_of_a_suite_ends_with_the_means_of_its_groups() -> None:
    runs = members({"a": 0.2, "b": 0.4, "c": 0.9})
    out = io.StringIO()
    print_suite({"recipe": "vtab/all", "members": runs, **over_groups(runs, GROUPS)}, file=out)
    *_, title, _, head, _, row, _ = out.getvalue().splitlines()
    assert title.strip() == "vtab/all: mean accuracy by group"
    assert head.split("┃")[1:-1] == [" natural (2) ", " structured (1) ", " mean of the 2 ", " of all 3 "]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["0.3000", "0.9000", "0.6000", "0.5000"]

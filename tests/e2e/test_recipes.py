"""Every file of recipes/ without the network: its header, its config, an epoch on small data of its own format."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from recipe_data import composed, small
from small import results

from coeft.cli.catalogue import RECIPES, recipe_names
from coeft.cli.compose import compose
from coeft.cli.recipe_list import Header, read_header
from coeft.config import TrainConfig
from coeft.errors import UserError

NAMES = recipe_names()


def header(name: str) -> Header:
    return read_header(RECIPES / f"{name}.yaml")


def runs(name: str) -> dict[str, TrainConfig]:
    """The runs of a recipe: of a suite its members, each with one seed."""
    composition = composed(name)
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
    from coeft.assemble import assemble, build_backbone
    from coeft.train import train

    (label, first), *others = runs(name).items()
    ready = small(first, tmp_path / "data")
    run = train(replace(ready, run_dir=str(tmp_path / "run")))
    found = results(run)
    assert found["status"] == "completed" and found["value"] is not None and found["metric"] == first.task.metric
    assert found["trainable_params"] > 0
    for other, config in others:
        made = replace(config, backbone=ready.backbone)
        built = assemble(made, build_backbone(made), made.task.outputs(["no", "yes"]))
        assert [*built.stack.methods] == [*config.peft], other

"""The tables of attention classes against the installed timm, and the page written from them."""

import ast
import importlib
import runpy
from pathlib import Path

import pytest
import timm
import torch
from tiny import FAMILIES, tiny_model

from coeft.attention.timm import PASSED_OVER, REFUSED, SUPPORTED, find_sites

DOCS = Path(__file__).parents[2] / "docs"
WORDS = {"softmax", "Softmax", "scaled_dot_product_attention", "MultiheadAttention"}


def classes_with_a_softmax() -> set[str]:
    """Every class of timm's models and layers that names a softmax or an attention function of torch."""
    root = Path(timm.__file__).parent
    found = set()
    for file in [*root.glob("models/*.py"), *root.glob("layers/*.py")]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                if names & WORDS:
                    found.add(f"timm.{file.parent.name}.{file.stem}.{node.name}")
    return found


def test_the_tables_hold_every_attention_class_of_the_installed_timm() -> None:
    listed = [*SUPPORTED, *REFUSED, *PASSED_OVER]
    assert len(listed) == len(set(listed))
    found = classes_with_a_softmax()
    assert len(found) > 60
    assert found <= set(listed)
    assert {name for name in listed if name.startswith("timm.")} <= found
    for name in listed:
        module, _, cls = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), cls), type)


def test_every_supported_class_is_in_a_tested_family() -> None:
    tested = set()
    for family in FAMILIES:
        for site in find_sites(tiny_model(family))[0]:
            tested.add(f"{type(site.module).__module__}.{type(site.module).__qualname__}")
    # no model of timm is built from this one, only custom EfficientNet definitions with "mha" blocks: tested alone in
    # tests/parity/test_coeff.py
    assert set(SUPPORTED) - tested == {"timm.layers.attention2d.Attention2d"}


def test_the_page_is_current() -> None:
    written = runpy.run_path(str(DOCS / "write_families.py"))["page"]()
    assert (DOCS / "families.md").read_text(encoding="utf-8") == written, "run python docs/write_families.py"


@pytest.mark.slow
def test_one_model_of_every_file_of_timm_is_taken_or_refused_with_a_reason() -> None:
    taken = 0
    for module in timm.list_modules():
        for name in timm.list_models(module=module)[:1]:
            with torch.device("meta"):
                sites, refusal = find_sites(timm.create_model(name, num_classes=0))
            assert bool(sites) != bool(refusal), name
            assert "lacks" not in str(refusal), f"{name}: {refusal}"
            taken += bool(sites)
    assert taken > 20

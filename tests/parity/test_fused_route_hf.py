"""The two routes of a transformers attention layer: over its maps, and without them."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_hf import FAMILIES, result, tiny_inputs, tiny_model
from torch import Tensor, nn

from coeft.adapt import Stack
from coeft.attention import hf_fused
from coeft.attention.hf import ROUTE, find_sites
from coeft.attention.mixer import CoeffMixer
from coeft.attention.site import BOTH_ROUTES
from coeft.backbones._hf import describe
from coeft.methods.coeff import Coeff

SDPA = [name for name, family in FAMILIES.items() if family.sdpa]
MAPS_ONLY = ["gpt2", "t5"]
"""Of SDPA: scores scaled by layer, a position bias."""


def mixed(family: str, **options: Any) -> tuple[nn.Module, list[CoeffMixer]]:
    backbone = describe(tiny_model(family, "sdpa", **options).double())
    Stack({"coeff": Coeff(dropout=0.0)}).attach(backbone, 0)
    mixers = [module for module in backbone.model.modules() if isinstance(module, CoeffMixer)]
    draw = torch.Generator().manual_seed(0)
    for mixer in mixers:
        mixer.set_alpha(0.5 * torch.randn(mixer.num_heads, mixer.num_heads, generator=draw))
    return backbone.model, mixers


def count(mixers: list[CoeffMixer]) -> list[str]:
    """Grows with every call of a mixer, by the route that it took."""
    calls: list[str] = []
    for mixer in mixers:
        mixer.register_forward_hook(lambda m, args, out: calls.append("maps" if len(args) == 1 else "fused"))
    return calls


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


@pytest.mark.parametrize("family", SDPA)
def test_both_routes_give_equal_outputs_and_gradients(family: str) -> None:
    model, mixers = mixed(family)
    calls = count(mixers)
    alphas = [mixer.coeff_alpha for mixer in mixers]
    for padding in ("", "left", "right") if FAMILIES[family].kind in ("text", "causal") else ("",):
        inputs = exact(tiny_inputs(family, padding))
        results = []
        for route in ("maps", "fused"):
            for mixer in mixers:
                mixer.route = route
            calls.clear()
            out = result(model, inputs)
            assert set(calls) == {"maps" if family in MAPS_ONLY else route}
            weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
            results.append((out, *torch.autograd.grad((out * weights).sum(), alphas)))
        for maps, fused in zip(*results, strict=True):
            # transformers takes the softmax of every model in float32, and the maps go over that
            torch.testing.assert_close(fused, maps, rtol=1e-5, atol=1e-5 * float(maps.detach().abs().max()))
        assert all(gradient.abs().max() > 1e-6 for gradient in results[0][1:])


def test_the_route_of_each_layer_is_shown() -> None:
    """T5 adds a position bias, GPT-2 scales by layer; eager is how transformers is asked for maps."""
    for family in ("llama", "clip", "gemma3", "bart", *MAPS_ONLY):
        sites, refusal = find_sites(tiny_model(family, "sdpa"))
        assert refusal is None
        assert {site.route for site in sites} == {ROUTE if family in MAPS_ONLY else BOTH_ROUTES}
    for family in ("llama", "gemma2", "gpt_oss"):
        assert {site.route for site in find_sites(tiny_model(family, "eager"))[0]} == {ROUTE}


def test_layers_with_many_tokens_go_without_maps_of_their_own_accord() -> None:
    model, mixers = mixed("bert", max_position_embeddings=520)
    calls = count(mixers)
    for batch, route in ((1, "maps"), (4, "fused")):
        calls.clear()
        with torch.no_grad():
            model(input_ids=torch.full((batch, 512), 5))
        assert calls == [route] * 2


def from_source(body: str, tmp_path: Any) -> Any:
    path = tmp_path / "written.py"
    path.write_text(f"def eager_attention_forward(module, query, key, value, attention_mask, scaling):\n{body}")
    module = ModuleType("written")
    module.__file__ = str(path)
    sys.modules["written"] = module
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module.eager_attention_forward


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        ("", True),
        ("    # a comment\n", True),
        ("    attn_weights = attn_weights + module.bias\n", False),
        ("    scaling = scaling / 2\n", False),
        ("    if softcap is not None:\n        attn_weights = torch.tanh(attn_weights)\n", False),
    ],
)
def test_one_more_statement_is_not_plain_attention(extra: str, plain: bool, tmp_path: Any) -> None:
    lines = [
        "    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling\n",
        extra,
        "    attn_weights = nn.functional.softmax(attn_weights, dim=-1)\n",
        "    attn_output = torch.matmul(attn_weights, value)\n",
        "    return attn_output, attn_weights\n",
    ]
    assert hf_fused.is_plain(from_source("".join(lines), tmp_path)) is plain
    lines[2:4] = lines[3:1:-1]
    if plain:
        assert not hf_fused.is_plain(from_source("".join(lines), tmp_path))  # another order


def test_a_softcap_or_a_position_bias_at_a_call_or_a_wish_for_maps_takes_the_maps() -> None:
    assert hf_fused.unchanged({"softcap": None, "scaling": 1.0})
    assert not hf_fused.unchanged({"softcap": 30.0})
    assert not hf_fused.unchanged({"position_bias": torch.zeros(1)})
    assert not hf_fused.unchanged({"output_attentions": True})


def test_compile_takes_the_fused_route() -> None:
    model, mixers = mixed("llama")
    for mixer in mixers:
        mixer.route = "fused"
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        expected = result(model, inputs)
        torch._dynamo.reset()
        got = result(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)

"""Head expansion: the algebra, and every layer of timm and transformers that coeft says it can expand."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_hf
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from coeft.adapt import Stack
from coeft.attention import expand_hf, expand_timm
from coeft.attention.expansion import check_expandable, expand_backbone
from coeft.attention.functional import coeff_attention
from coeft.backbones._backbone import Backbone
from coeft.backbones._hf import describe
from coeft.errors import UserError
from coeft.expand import ADDED, expand
from coeft.methods.coeff import Coeff

TIMM = [
    "vit", "vit_registers", "vit_parallel", "deit3", "dinov2", "dinov3", "eva02", "pe", "siglip", "swin", "qwen3",
]  # fmt: skip
HF = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3", "vit", "dinov2", "ast"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(x: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Grouped-query attention from projections: x (N, C), weights (heads * d, C), output (C, H * d)."""
    heads, kv_heads, size = sizes
    q, k, v = (
        (x @ w.T).unflatten(-1, (n, size)).transpose(0, 1)
        for w, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(0, 1).flatten(1) @ output.T


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (6, 2), (4, 1), (1, 1)])
def test_plain_attention_with_more_heads_is_attention_with_mixed_maps(heads: int, kv_heads: int) -> None:
    size, width = 5, 12
    x, mixing = draw(7, width), torch.eye(heads, dtype=torch.float64) + draw(heads, heads, seed=9)
    query, key, value = (draw(n * size, width, seed=i) for i, n in ((1, heads), (2, kv_heads), (3, kv_heads)))
    output = draw(width, heads * size, seed=4)
    q, k, v = (
        (x @ w.T).unflatten(-1, (n, size)).transpose(0, 1)
        for w, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    wanted = coeff_attention(q, k, v, mixing, enable_gqa=True, implementation="reference")
    wanted = wanted.transpose(0, 1).flatten(1) @ output.T
    found = expand(mixing, kv_heads)
    assert (found.num_heads, found.num_kv_heads) == (heads * kv_heads, kv_heads**2)
    for some in (found, found.padded(found.num_kv_heads + 3)):
        weights = some.of_keys(query), some.of_keys(key), some.of_values(value), some.of_outputs(output)
        expanded = plain(x, *weights, (some.num_heads, some.num_kv_heads, size))
        torch.testing.assert_close(expanded, wanted, rtol=1e-10, atol=1e-10)


def test_pairs_without_a_coefficient_cost_nothing() -> None:
    identity = torch.eye(6)
    assert expand(identity).num_heads == 6 and expand(identity, 2).num_heads == 6
    weight = draw(3, 12)
    assert torch.equal(expand(identity, 2).of_outputs(weight), weight)
    mixing = identity.clone()
    mixing[4, 0] = 0.3  # output head 4 has the last of three values, map 0 the first of three keys
    found = expand(mixing, 3)
    assert list(zip(found.key.tolist(), found.value.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 1), (2, 2)]


def test_a_threshold_leaves_out_what_is_smaller_and_nothing_else() -> None:
    mixing = torch.tensor([[1.0, 0.05, -0.2], [0.1, 0.9, 0.0], [-0.05, 0.0, 1.1]])
    assert expand(mixing).num_heads == 7
    found = expand(mixing, threshold=0.1)
    kept = torch.zeros(3, 3, dtype=torch.float64)
    kept[found.value, found.key] = found.output[:, 0, 0]
    torch.testing.assert_close(kept, torch.where(mixing.abs() < 0.1, 0.0, mixing).double())


def test_a_layer_of_which_nothing_is_left_keeps_a_head_that_gives_zero() -> None:
    found = expand(torch.eye(3), threshold=2.0)
    assert found.num_heads == 0
    assert torch.equal(found.padded(1).of_outputs(draw(5, 12)), torch.zeros(5, 4, dtype=torch.float64))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="5 key-value heads"):
        expand(torch.eye(6), 5)
    with pytest.raises(ValueError, match="do not fit into 2"):
        expand(torch.eye(6)).padded(2)
    with pytest.raises(ValueError, match="do not belong"):
        expand(torch.eye(6)).of_keys(torch.ones(7))
    assert expand(torch.eye(2)).padded(3).key.tolist() == [0, 1, ADDED]


def mix(backbone: Backbone, layers: list[int | str] | None = None) -> None:
    """Attach coeff with large random coefficients."""
    Stack({"coeff": Coeff(layers=layers)}).attach(backbone, 0)
    for number, site in enumerate(backbone.sites):
        mixer: Any = getattr(site.module, "coeff_mix", None)
        if mixer is not None:
            mixer.set_alpha(0.3 * draw(site.num_heads, site.num_heads, seed=number))
    backbone.model.eval()


def expanded_timm(backbone: Backbone, folder: Path) -> nn.Module:
    _, arguments = expand_backbone(backbone)
    state = {name: tensor.contiguous() for name, tensor in backbone.model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    save_config_for_hf(backbone.model, str(folder / "config.json"), model_config={"expanded_attention": arguments})
    return expand_timm.load(str(folder))


@torch.no_grad()
@pytest.mark.parametrize("family", TIMM)
def test_expanded_layers_of_timm_give_the_same_logits(family: str, tmp_path: Path) -> None:
    backbone, images = tiny.tiny_backbone(family), tiny.tiny_images(family)
    before = backbone.model(images)
    mix(backbone)
    wanted = backbone.model(images)
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(expanded_timm(backbone, tmp_path)(images), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_of_timm_without_coeff_stay_as_they_are(tmp_path: Path) -> None:
    backbone, images = tiny.tiny_backbone("vit"), tiny.tiny_images("vit")
    mix(backbone, layers=[-1])
    wanted = backbone.model(images)
    expanded = expanded_timm(backbone, tmp_path)
    assert [block.attn.num_heads for block in expanded.blocks] == [3, 9]
    torch.testing.assert_close(expanded(images), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_kv_heads": 3}, {"num_kv_heads": 1}, {"gated": True}, {"qk_norm": True},
                                     {"gated": True, "num_kv_heads": 1}])  # fmt: skip
def test_grouped_queries_gates_and_norms_of_queries_in_timm(options: dict[str, Any]) -> None:
    from timm.layers import AttentionRope

    from coeft.attention.site import AttentionSite
    from coeft.attention.timm import find_sites

    torch.manual_seed(0)
    layer = AttentionRope(24, 3, qkv_fused=False, norm_layer=nn.LayerNorm, **options).eval()
    tiny.scale_up(layer)
    holder = nn.ModuleDict({"attn": layer})
    [site] = find_sites(holder)[0]
    assert isinstance(site, AttentionSite)
    backbone = Backbone(name="layer", kind="timm", model=holder, sites=[site], head="")
    x = torch.randn(2, 7, 24)
    mix(backbone)
    wanted = layer(x)
    _, arguments = expand_backbone(backbone)
    fresh = AttentionRope(**arguments["attn"], norm_layer=nn.LayerNorm).eval()
    fresh.q_norm, fresh.k_norm = layer.q_norm, layer.k_norm
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", HF)
def test_expanded_models_of_transformers_give_the_same_logits(family: str, tmp_path: Path) -> None:
    causal = tiny_hf.FAMILIES[family].kind == "causal"
    implementation = "sdpa" if tiny_hf.FAMILIES[family].sdpa else "eager"
    model = tiny_hf.tiny_model(family, implementation)
    inputs = tiny_hf.tiny_inputs(family, padding="left" if causal else "")
    before = tiny_hf.result(model, inputs)
    backbone = describe(model)
    mix(backbone)
    wanted = tiny_hf.result(model, inputs)
    assert (wanted - before).abs().max() > 0.1
    expand_backbone(backbone)
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path, attn_implementation=implementation).eval()
    torch.testing.assert_close(tiny_hf.result(fresh, inputs), wanted, rtol=1e-5, atol=1e-5)
    if causal:  # keys and values of 2 heads became those of 4, not of 16
        assert fresh.config.num_key_value_heads == 4 and fresh.config.num_attention_heads == 8


@torch.no_grad()
def test_layers_without_coeff_get_heads_that_give_zero(tmp_path: Path) -> None:
    model = tiny_hf.tiny_model("qwen3", "sdpa")
    inputs = tiny_hf.tiny_inputs("qwen3")
    backbone = describe(model)
    mix(backbone, layers=[-1])
    wanted = tiny_hf.result(model, inputs)
    heads, _ = expand_backbone(backbone)
    assert [list(h.key) for h in heads.values()] == [[0, 1, ADDED, ADDED], [0, 0, 1, 1]]
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny_hf.result(fresh, inputs), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_number_of_heads_that_the_config_allows_is_found(tmp_path: Path) -> None:
    # 27 heads are needed and must divide the width of 72 in Llama's config: 36 do
    options = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = tiny_hf.tiny_model("llama", "sdpa", **options)
    inputs = tiny_hf.tiny_inputs("llama")
    backbone = describe(model)
    mix(backbone)
    wanted = tiny_hf.result(model, inputs)
    heads, _ = expand_backbone(backbone)
    assert {h.num_heads for h in heads.values()} == {36}
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny_hf.result(fresh, inputs), wanted, rtol=1e-5, atol=1e-5)


def test_more_heads_than_the_config_allows_are_refused_with_the_alternative() -> None:
    model = tiny_hf.tiny_model("llama", hidden_size=8, num_attention_heads=4, num_key_value_heads=4)
    backbone = describe(model)
    mix(backbone)
    with pytest.raises(UserError, match="refuses 16 to 64 heads .*not a multiple.*--coeff keep"):
        expand_backbone(backbone)


@pytest.mark.parametrize("family", ["beit", "vit_relpos", "swinv2", "crossvit", "cait"])
def test_layers_of_timm_that_cannot_be_expanded_are_refused_by_name(family: str) -> None:
    backbone = tiny.tiny_backbone(family)
    mix(backbone)
    with pytest.raises(UserError, match=r"--coeff expand does not fit .*\(timm\..*--coeff keep"):
        check_expandable(backbone)


def test_a_norm_over_all_heads_is_refused() -> None:
    backbone = tiny.tiny_backbone("eva02", scale_attn_inner=True)
    mix(backbone)
    with pytest.raises(UserError, match="norms the outputs of all heads together"):
        check_expandable(backbone)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "clip"])
def test_models_of_transformers_that_cannot_be_expanded_are_refused_by_name(family: str) -> None:
    backbone = describe(tiny_hf.tiny_model(family))
    mix(backbone)
    with pytest.raises(UserError, match=f"transformers for {family} are not known.*--coeff keep"):
        check_expandable(backbone)


def test_quantised_projections_are_refused() -> None:
    class Quantised(nn.Linear):
        pass

    model = tiny_hf.tiny_model("llama")
    backbone = describe(model)
    for site in backbone.sites:
        site.module.v_proj = Quantised(32, 16)
    with pytest.raises(UserError, match="its projections are .*Quantised, not plain linear layers"):
        check_expandable(backbone)


def test_the_tables_name_what_is_tested() -> None:
    types = {tiny_hf.config_of(family).model_type for family in HF}
    assert set(expand_hf.EXPANDABLE) == types
    classes = set()
    for family in TIMM:
        for site in tiny.tiny_backbone(family).sites:
            classes.add(f"{type(site.module).__module__}.{type(site.module).__qualname__}")
    assert set(expand_timm.EXPANDABLE) == classes


def test_the_page_on_export_names_what_can_be_expanded() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    classes = [name.rpartition(".")[2] for name in expand_timm.EXPANDABLE]
    assert not [name for name in [*classes, *expand_hf.EXPANDABLE] if f"`{name}`" not in page]

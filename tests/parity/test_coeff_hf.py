"""Coeff-Tuning on transformers models: against the untouched model, an independent layer, and by its properties."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_hf import ENCODER, FAMILIES, VOCAB, result, tiny_inputs, tiny_model
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel

import coeft
from coeft.adapt import Attachment, Stack, count_parameters
from coeft.adapter_io import fingerprint, save_adapter
from coeft.attention import hf
from coeft.attention.hf import find_sites
from coeft.attention.mixer import CoeffMixer
from coeft.backbones._backbone import Backbone
from coeft.backbones._hf import describe
from coeft.errors import UserError
from coeft.methods.coeff import Coeff
from coeft.methods.lora import LoRA

RUNS = [(f, i) for f in FAMILIES for i in ("eager", "sdpa") if i == "eager" or FAMILIES[f].sdpa]
TEXT = [f for f in FAMILIES if FAMILIES[f].kind in ("text", "causal", "seq2seq")]
CAUSAL = [f for f in FAMILIES if FAMILIES[f].kind == "causal"]
GENERATE = [f for f in FAMILIES if FAMILIES[f].kind in ("causal", "seq2seq", "speech")]
SLIDING = [f for f in FAMILIES if FAMILIES[f].sliding]


@cache
def _plain(family: str, implementation: str) -> PreTrainedModel:
    return tiny_model(family, implementation)


def plain(family: str, implementation: str = "eager") -> PreTrainedModel:
    return copy.deepcopy(_plain(family, implementation))


def attached(
    family: str, implementation: str = "eager", model: nn.Module | None = None, std: float = 0.0, **settings: Any
) -> tuple[Backbone, Attachment]:
    """A model of the family with coeff attached, its coefficients random of this deviation."""
    backbone = describe(plain(family, implementation) if model is None else model)
    stack = Stack({"coeff": Coeff(**settings)})
    stack.attach(backbone, 0)
    if std:
        set_random(stack.attachments[0], std)
    return backbone, stack.attachments[0]


def set_random(attachment: Attachment, std: float = 0.5, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters.values():
        parameter.data = std * torch.randn(parameter.shape, generator=draw).to(parameter)


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A weighted sum, since CLIP's outputs are of length one whatever the coefficients."""
    output = result(model, inputs)
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum()


@pytest.mark.parametrize(("family", "implementation"), RUNS)
def test_zero_is_the_untouched_model_and_anything_else_is_not(family: str, implementation: str) -> None:
    before = plain(family, implementation)
    names = set(before.state_dict())
    backbone, attachment = attached(family, implementation)
    model = backbone.model
    assert [site.num_heads for site in backbone.sites] == FAMILIES[family].heads
    assert [p.shape[0] for p in attachment.parameters.values()] == FAMILIES[family].heads
    assert set(model.state_dict()) - names == set(attachment.parameters)
    for padding in ("", "left", "right"):
        inputs = tiny_inputs(family, padding)
        with torch.no_grad():
            expected = result(before, inputs)
            set_random(attachment, 0.0)
            got = result(model, inputs)
            if implementation == "eager":
                assert torch.equal(got, expected), padding
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            set_random(attachment)
            assert (result(model, inputs) - expected).abs().max() > 0.2 * expected.std(), padding


@pytest.mark.parametrize(("family", "implementation"), RUNS)
def test_layers_without_a_mixer_are_what_they_were_to_the_bit(family: str, implementation: str) -> None:
    """Only the last layer is mixed: whatever comes before it must not notice."""
    outputs: list[list[Tensor]] = []
    for mixed in (False, True):
        model: nn.Module = plain(family, implementation)
        names = [site.name for site in find_sites(model)[0]]
        if mixed:
            backbone, attachment = attached(family, model=model, std=0.5, layers=[-1])
            assert [place.name for place in attachment.places] == names[-1:]
        seen: list[Tensor] = []
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
        with torch.no_grad():
            result(model, tiny_inputs(family, "right"))
        outputs.append(seen)
    assert len(outputs[0]) == len(outputs[1]) == len(names) > 1
    for one, other in zip(outputs[0][:-1], outputs[1][:-1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(outputs[0][-1], outputs[1][-1])


@pytest.mark.parametrize(("family", "implementation"), RUNS)
def test_looking_for_sites_leaves_no_trace(family: str, implementation: str) -> None:
    model = plain(family, implementation).train()
    modes = [(module, module.training) for module in model.modules()]
    configs = [(config, config._attn_implementation) for config in hf._configs(model)]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert find_sites(model)[0]
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training is mode for module, mode in modes)
    assert all(config._attn_implementation == name == implementation for config, name in configs)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixer_is_called_and_every_alpha_gets_a_gradient(family: str) -> None:
    backbone, attachment = attached(family)
    inputs = tiny_inputs(family)
    stack = Stack({})
    stack.attachments = [attachment]
    assert stack.probe(backbone, inputs) is not None
    calls: list[str] = []
    for place, mixer in attachment.probes.items():
        mixer.register_forward_hook(lambda *_, place=place: calls.append(place))
    loss_of(backbone.model, inputs).backward()
    assert calls == [site.name for site in backbone.sites]
    for name, parameter in backbone.model.named_parameters():
        if name in attachment.parameters:
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
        elif not backbone.head or not name.startswith(f"{backbone.head}."):
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_the_sites(family: str) -> None:
    backbone = describe(plain(family))
    assert len(set(backbone.blocks)) == len(backbone.blocks) > 0
    for site in backbone.sites:
        assert sum(site.name.startswith(f"{block}.") for block in backbone.blocks) == 1
    entries = {block.rpartition(".")[2] for block in backbone.blocks}
    assert entries <= {"0", "1"}


def layer(attention: Any, x: Tensor, coeff: Tensor, visible: Tensor) -> Tensor:
    """A Llama attention layer, one query head at a time, from its weights; visible (B, N, N)."""
    H, d = coeff.shape[0], attention.head_dim
    groups = H // (attention.k_proj.weight.shape[0] // d)
    at = torch.arange(x.shape[1], dtype=x.dtype)

    def turn(y: Tensor) -> Tensor:  # rotary positions: pairs (i, i + d/2) turn by position / 10000^(2i/d)
        angle = at[:, None] / 10000 ** (2 * torch.arange(d // 2, dtype=x.dtype) / d)
        one, two = y[..., : d // 2], y[..., d // 2 :]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    def head(linear: nn.Linear, h: int) -> Tensor:
        return x @ linear.weight[h * d : (h + 1) * d].T

    maps = []
    for h in range(H):
        scores = turn(head(attention.q_proj, h)) @ turn(head(attention.k_proj, h // groups)).transpose(1, 2) / d**0.5
        weights = scores.exp() * visible
        maps.append(weights / weights.sum(-1, keepdim=True))
    heads = [sum(coeff[g, h] * maps[h] for h in range(H)) @ head(attention.v_proj, g // groups) for g in range(H)]
    return torch.cat(heads, -1) @ attention.o_proj.weight.T


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_mixed_layer_of_a_llama_equals_its_formula_with_all_gradients(implementation: str) -> None:
    """Grouped queries (4 over 2), causal mask and padding on the left, in float64."""
    backbone, attachment = attached("llama", implementation, std=0.5)
    backbone.model.double()
    site = backbone.sites[1]
    module: Any = site.module
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=draw, requires_grad=True)
    target = torch.randn(2, 7, 32, dtype=torch.float64, generator=draw)
    target[1, :2] = 0  # queries that see nothing
    visible = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    visible[1, :, :2] = False
    mask = visible[:, None]
    if implementation == "eager":
        mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    visible[1, :2, 0] = True  # in the reference, so that these rows are finite
    angle = torch.arange(7, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)
    angle = torch.cat([angle, angle], -1)[None]
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    alpha = attachment.parameters[f"{site.name}.coeff_mix.coeff_alpha"]
    # softmax in float32 is Llama's own choice in eager attention; the reference follows in float64
    with pytest.MonkeyPatch.context() as patch:
        softmax = torch.nn.functional.softmax
        patch.setattr(torch.nn.functional, "softmax", lambda s, dim=-1, dtype=None: softmax(s, dim=dim))
        got = module(x, position_embeddings=(angle.cos(), angle.sin()), attention_mask=mask)[0]
    expected = layer(module, x, torch.eye(4, dtype=torch.float64) + alpha, visible)
    real = target != 0
    torch.testing.assert_close(got[real], expected[real], rtol=1e-10, atol=1e-10)
    wanted = [x, *module.parameters()]
    assert any(parameter is alpha for parameter in wanted)
    ours = torch.autograd.grad((got * target).sum(), wanted)
    theirs = torch.autograd.grad((expected * target).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


PROJECTIONS = {
    "bert": ("query", "key"),
    "vit": ("q_proj", "k_proj"),
    "ast": ("q_proj", "k_proj"),
    "opt": ("q_proj", "k_proj"),
    "llama": ("q_proj", "k_proj"),
    "t5": ("q", "k"),
}


@pytest.mark.parametrize("family", PROJECTIONS)
def test_a_permutation_is_the_same_as_permuted_queries_and_keys(family: str) -> None:
    """alpha' = P against the untouched model whose q and k projections (and position biases) are permuted by P."""
    options = {"num_key_value_heads": 4} if family == "llama" else {}
    backbone, attachment = attached(family, model=tiny_model(family, **options))
    permuted, inputs = tiny_model(family, **options), tiny_inputs(family, "right")
    with torch.no_grad():
        unmoved = result(permuted, inputs)
        for site in backbone.sites:
            order = torch.arange(site.num_heads).roll(1)
            alpha = attachment.parameters[f"{site.name}.coeff_mix.coeff_alpha"]
            alpha.data = torch.eye(site.num_heads)[order] - torch.eye(site.num_heads)
            attention: Any = permuted.get_submodule(site.name)
            for name in PROJECTIONS[family]:
                for tensor in getattr(attention, name).parameters():
                    parts = tensor.view(site.num_heads, -1, *tensor.shape[1:])
                    parts.copy_(parts[order].clone())
            if getattr(attention, "has_relative_attention_bias", False):
                table = attention.relative_attention_bias.weight
                # a deeper T5 layer shares this bias, permuted the same way
                table.copy_(table[:, order].clone())
        expected = result(permuted, inputs)
        torch.testing.assert_close(result(backbone.model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - unmoved).abs().max() > 0.05 * unmoved.std()


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states, or of a model with a decoder its logits."""
    if "decoder_input_ids" in inputs:
        return result(model, inputs)
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "implementation"), [run for run in RUNS if run[0] in TEXT])
def test_a_padded_token_changes_nothing_to_the_bit(family: str, implementation: str, padding: str) -> None:
    backbone, _ = attached(family, implementation, std=0.5)
    inputs = tiny_inputs(family, padding)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    masked = inputs["attention_mask"] == 0
    other["input_ids"][masked] = (other["input_ids"][masked] + 7) % (VOCAB - 3) + 3
    keep = slice(None) if "decoder_input_ids" in inputs else ~masked
    with torch.no_grad():
        one, two = hidden(backbone.model, inputs)[keep], hidden(backbone.model, other)[keep]
        if family == "gpt_oss":  # how many tokens an expert gets changes how its products are summed
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(one, two)
        if padding == "right" and family in CAUSAL:
            return  # nothing that is left sees these tokens, masked or not
        for given in (inputs, other):
            given["attention_mask"] = torch.ones_like(given["attention_mask"])
        assert (hidden(backbone.model, inputs)[keep] - hidden(backbone.model, other)[keep]).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "implementation"), [run for run in RUNS if run[0] in GENERATE])
def test_a_later_token_changes_nothing_to_the_bit(family: str, implementation: str) -> None:
    backbone, _ = attached(family, implementation, std=0.5)
    inputs = tiny_inputs(family)
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    other = dict(inputs, **{key: inputs[key].clone()})
    other[key][:, 4] = (other[key][:, 4] + 7) % (VOCAB - 3) + 3
    with torch.no_grad():
        one, two = result(backbone.model, inputs), result(backbone.model, other)
    if family == "gpt_oss":
        torch.testing.assert_close(one[:, :4], two[:, :4], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(one[:, :4], two[:, :4])
    assert (one[:, 4] - two[:, 4]).abs().max() > 1e-2 and (one[:, 5] - two[:, 5]).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "implementation"), [run for run in RUNS if run[0] in SLIDING])
def test_a_token_outside_of_the_window_changes_nothing_to_the_bit(family: str, implementation: str) -> None:
    """Two layers that see three tokens back (ModernBERT: two to each side) reach six back."""
    model = tiny_model(family, implementation, **FAMILIES[family].sliding)
    backbone, _ = attached(family, model=model, std=0.5)
    inputs = tiny_inputs(family, tokens=12)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][:, 0] = (other["input_ids"][:, 0] + 7) % (VOCAB - 3) + 3
    with torch.no_grad():
        one, two = hidden(backbone.model, inputs), hidden(backbone.model, other)
    if family == "gpt_oss":
        torch.testing.assert_close(one[:, 7:], two[:, 7:], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(one[:, 7:], two[:, 7:])
    assert (one[:, 2] - two[:, 2]).abs().max() > 1e-2


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Eight tokens, greedy, none twice: random models like to repeat one."""
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    # not Whisper's own generate, which wants a tokenizer's special tokens
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "no_repeat_ngram_size": 1} | options
    return transformers.GenerationMixin.generate(model, **given, do_sample=False, disable_compile=True, **options)


@pytest.mark.parametrize(("family", "implementation"), [run for run in RUNS if run[0] in GENERATE])
def test_generation_with_a_cache_equals_generation_without(family: str, implementation: str) -> None:
    backbone, attachment = attached(family, implementation, std=0.5)
    model = backbone.model
    for padding in ("", "left"):
        inputs = tiny_inputs(family, padding)
        expected = generated(model, inputs, use_cache=False)
        assert torch.equal(generated(model, inputs, use_cache=True), expected)
        assert torch.equal(generated(model, inputs, use_cache=True, cache_implementation="static"), expected)
    set_random(attachment, 0.0)
    zero = generated(model, inputs)
    assert torch.equal(zero, generated(plain(family, implementation), inputs)) and not torch.equal(zero, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        backbone, attachment = attached(family, std=0.3)
        model: Any = backbone.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        loss_of(model, tiny_inputs(family)).backward()
        grads.append([p.grad for p in attachment.parameters.values()])
        result(model, tiny_inputs(family))  # and the guard is in order afterwards
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        ("vit", "eager"),
        pytest.param("llama", "sdpa", marks=pytest.mark.slow),
        pytest.param("bert", "sdpa", marks=pytest.mark.slow),
        pytest.param("llama", "eager", marks=pytest.mark.slow),
        pytest.param("gemma2", "eager", marks=pytest.mark.slow),
    ],
)
def test_compile_follows_the_coefficients_and_keeps_the_guard(family: str, implementation: str) -> None:
    backbone, attachment = attached(family, implementation)
    model: Any = backbone.model
    inputs = tiny_inputs(family)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            set_random(attachment, seed=seed)
            torch.testing.assert_close(result(compiled, inputs), result(model, inputs), rtol=1e-4, atol=1e-4)
    trained = torch.compile(copy.deepcopy(model).train(), backend="aot_eager")
    loss_of(trained, inputs).backward()
    grads = [p.grad for name, p in trained.named_parameters() if "coeff_alpha" in name]
    assert len(grads) == 2 and all(grad is not None and grad.abs().max() > 0 for grad in grads)
    model.set_attn_implementation(implementation)
    with pytest.raises(Exception, match="did not pass"):
        compiled(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_and_models_in_half_precision(family: str) -> None:
    backbone, attachment = attached(family, std=0.2)
    inputs, model = tiny_inputs(family), backbone.model
    with torch.no_grad():
        expected = result(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast = result(model, inputs)
        model.bfloat16()
        given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        halved = result(model, given)
        set_random(attachment, 0.0)
        assert torch.equal(result(model, given), result(plain(family).bfloat16(), given))
    assert halved.dtype == torch.bfloat16
    for got in (cast, halved):
        assert (got.float() - expected).abs().mean() < 0.15 * expected.std()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "clip", "llama", "t5", "whisper"])
def test_another_attention_implementation_is_an_error(family: str, implementation: str) -> None:
    backbone, _ = attached(family, implementation, std=0.5)
    model: Any = backbone.model
    inputs = tiny_inputs(family, "left")
    with torch.no_grad():
        expected = result(model, inputs)
    ours = model.config._attn_implementation
    assert ours == f"coeft_{implementation}"
    model.set_attn_implementation(implementation)
    message = rf"{backbone.sites[0].name}: the attention maps did not pass .* is '{implementation}' now: .*'{ours}'"
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.train(mode)(**inputs)
    model.set_attn_implementation(ours)
    with torch.no_grad():
        assert torch.equal(result(model, inputs), expected)


def test_flash_attention_gives_way_to_sdpa_and_parts_keep_their_own() -> None:
    model = plain("clip", "sdpa")
    model.vision_model.config._attn_implementation = "eager"
    model.config._attn_implementation_internal = "flash_attention_2"
    attached("clip", model=model)
    assert model.config._attn_implementation == "coeft_sdpa"
    assert model.text_model.config._attn_implementation == "coeft_sdpa"
    assert model.vision_model.config._attn_implementation == "coeft_eager"
    result(model, tiny_inputs("clip"))


def test_deepcopy_acts_on_its_own_coefficients() -> None:
    backbone, attachment = attached("llama", std=0.5)
    model, inputs = backbone.model, tiny_inputs("llama")
    with torch.no_grad():
        expected = result(model, inputs)
        other: Any = copy.deepcopy(model)
        assert torch.equal(result(other, inputs), expected)
        for name, parameter in other.named_parameters():
            if name.endswith("coeff_alpha"):
                parameter.zero_()
        assert torch.equal(result(other, inputs), result(plain("llama"), inputs))
        assert torch.equal(result(model, inputs), expected)
    other.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="did not pass"):
        other(**inputs)
    model(**inputs)


@pytest.mark.parametrize(
    ("family", "pattern", "count"),
    [
        ("t5", "^encoder", 2),
        ("t5", "^decoder.*SelfAttention", 2),
        ("t5", "EncDecAttention", 2),
        ("bart", "encoder.layers", 2),
        ("bart", "decoder.*self_attn", 2),
        ("bart", "encoder_attn", 2),
        ("whisper", "encoder.layers", 1),
        ("whisper", "decoder.*self_attn", 2),
        ("whisper", "encoder_attn", 2),
        ("clip", "text_model", 2),
        ("siglip", "vision_model", 2),
    ],
)
def test_layers_chooses_encoder_decoder_and_cross_attention(family: str, pattern: str, count: int) -> None:
    assert f"`{pattern}`" in hf.TESTED[family][1]
    backbone, attachment = attached(family, layers=[pattern])
    mixers = [name for name, module in backbone.model.named_modules() if isinstance(module, CoeffMixer)]
    assert len(mixers) == len(attachment.places) == count
    inputs = tiny_inputs(family)
    with torch.no_grad():
        expected = result(plain(family), inputs)
        assert torch.equal(result(backbone.model, inputs), expected)
        set_random(attachment)
        assert (result(backbone.model, inputs) - expected).abs().max() > 0.05 * expected.std()


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        (
            "Llama-3-8B",
            {
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "vocab_size": 128256,
            },
            32768,
        ),
        (
            "SmolLM2-135M",
            {
                "hidden_size": 576,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "intermediate_size": 1536,
                "vocab_size": 49152,
                "tie_word_embeddings": True,
            },
            2430,
        ),
    ],
)
def test_trainable_parameters_are_the_squares_of_the_heads(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        backbone = describe(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)), name=name)
    stack = Stack({"coeff": Coeff()})
    stack.attach(backbone, 0)
    counts = count_parameters(backbone, stack)
    assert counts.trainable == counts.adapter == count and counts.head == 0


def test_a_layer_reaches_beyond_the_convex_hull_of_its_values() -> None:
    """Target: minus the layer's own output before projection. No attention map gives it; alpha' = -I does."""
    backbone, attachment = attached("llama", "sdpa", dropout=0.0)
    attention: Any = backbone.sites[0].module
    seen: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    inputs = tiny_inputs("llama", tokens=20)
    with torch.no_grad():
        backbone.model(**inputs)
    target = -seen[0]
    (alpha, _) = attachment.parameters.values()
    optimizer = torch.optim.Adam([alpha], lr=0.05)
    losses = []
    for _ in range(200):
        seen.clear()
        backbone.model(**inputs)
        loss = (seen[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.1 and losses[-1] < 1e-3
    torch.testing.assert_close(alpha.detach(), -2 * torch.eye(4), atol=0.1, rtol=0)


def test_the_maps_that_a_model_returns_are_the_mixed_ones() -> None:
    backbone, _ = attached("llama", std=0.5)
    inputs = tiny_inputs("llama")
    maps = backbone.model(**inputs, output_attentions=True).attentions[0]
    before = plain("llama")(**inputs, output_attentions=True).attentions[0]
    mixer: Any = backbone.sites[0].module.coeff_mix
    torch.testing.assert_close(maps, torch.einsum("gh,bhnm->bgnm", torch.eye(4) + mixer.alpha(), before))


@pytest.mark.parametrize(("family", "classes"), [("bert", ["no", "yes"]), ("llama", []), ("bart", [])])
def test_load_adapter_restores_everything(family: str, classes: list[str], tmp_path: Path) -> None:
    model = plain(family, "sdpa")
    backbone = describe(model)
    base = fingerprint(model, backbone.head)
    pattern = {"bert": "(query|value)$", "llama": "(q|v)_proj$", "bart": "(q|v)_proj$"}[family]
    stack = Stack({"coeff": Coeff(), "lora": LoRA(rank=2, target_modules=[pattern])})
    stack.attach(backbone, 0)
    draw = torch.Generator().manual_seed(0)
    for parameters in [*stack.parameters().values(), backbone.head_parameters()]:
        for parameter in parameters.values():
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    save_adapter(
        tmp_path / "adapter", backbone, stack, base=base, num_outputs=len(classes), class_names=classes, card=""
    )
    inputs = tiny_inputs(family, "right")
    with torch.no_grad():
        expected = result(model, inputs)
        restored = coeft.load_adapter(plain(family, "sdpa"), tmp_path / "adapter")
        assert torch.equal(result(restored, inputs), expected)
        assert (result(plain(family), inputs) - expected).abs().max() > 0.1 * expected.std()
    with pytest.raises(UserError, match="same shapes but other weights"):
        coeft.load_adapter(tiny_model(family, seed=1), tmp_path / "adapter")


def test_a_new_head_follows_from_the_seed() -> None:
    backbone = describe(plain("bert"))
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)
        backbone.new_head(2, seed)
        heads.append([p.detach().clone() for p in backbone.head_parameters().values()])
    assert all(torch.equal(one, other) for one, other in zip(heads[0], heads[1], strict=True))
    assert not torch.equal(heads[0][0], heads[2][0]) and 0.01 < heads[0][0].std() < 0.04
    backbone.new_head(3, 0)
    assert backbone.model.config.num_labels == 3 and result(backbone.model, tiny_inputs("bert")).shape == (2, 3)
    with pytest.raises(UserError, match="has no classifier, not for 2 either"):
        describe(plain("llama")).new_head(2, 0)


def test_attaching_twice_is_refused() -> None:
    backbone, _ = attached("bert")
    with pytest.raises(UserError, match="bert.encoder.layer.0.attention.self has a coeff mixer already"):
        Stack({"coeff": Coeff()}).attach(backbone, 0)


# class -> its config and options that make it small
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": VOCAB}
GPT = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 40, "rotary_dim": 4, "vocab_size": VOCAB}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "BloomForCausalLM": ("BloomConfig", {"n_layer": 2, "n_head": 3, "hidden_size": 24, "vocab_size": VOCAB}, "BLOOM"),
    "GPTJForCausalLM": ("GPTJConfig", GPT, "GPT-J"),
    "CodeGenForCausalLM": ("CodeGenConfig", GPT | {"n_head": 4, "n_embd": 32}, "CodeGen"),
    "FalconForCausalLM": ("FalconConfig", TINY, "Falcon"),
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}, "MPT"),
    "DebertaModel": ("DebertaConfig", ENCODER, "DeBERTa"),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", ENCODER, "DeBERTa-v2, DeBERTa-v3"),
    "Swinv2ForImageClassification": (
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 3], "window_size": 4},
        "Swin v2",
    ),
    "XLNetLMHeadModel": ("XLNetConfig", {"d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 40}, "XLNet"),
    "LongformerModel": ("LongformerConfig", ENCODER | {"attention_window": 4}, "Longformer"),
    "FNetModel": ("FNetConfig", TINY | {"intermediate_size": 40, "tpu_short_seq_length": 6}, "FNet"),
    "TimmWrapperForImageClassification": ("TimmWrapperConfig", {"architecture": "test_vit"}, "timm models inside"),
}


def refused(name: str) -> PreTrainedModel:
    config, options, _ = REFUSED[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_ask_the_interface_are_refused_by_name(name: str) -> None:
    backbone = describe(refused(name), name="mine")
    assert backbone.sites == []
    message = rf"peft.coeff does not fit mine: coeff cannot mix the attention of {name}: .*{REFUSED[name][2]}"
    with pytest.raises(UserError, match=message):
        Coeff().attach(backbone)


def test_every_refusal_in_the_table_is_tested() -> None:
    families = {families for families, _ in hf.REFUSED.values()}
    assert families == {tested for _, _, tested in REFUSED.values()} - {"timm models inside"} | {
        "timm models inside transformers"
    }
    assert set(hf.TESTED) == {plain(family).config.model_type for family in FAMILIES}


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_without_the_table_and_by_the_probe_alone(name: str, monkeypatch: Any) -> None:
    model = refused(name)
    inputs = {"pixel_values": torch.zeros(1, 3, 160, 160)} if name.startswith("Timm") else None
    monkeypatch.setattr(hf, "REFUSED", {})
    sites, refusal = find_sites(model, inputs)
    assert sites == [] and refusal
    monkeypatch.setattr(hf, "_bypassing", lambda top, names: [])
    sites, refusal = find_sites(model, inputs)
    assert sites == [] and f"{name} has no attention layers that ask transformers' attention interface" in str(refusal)
    assert model.config._attn_implementation not in (hf.PROBE, hf.EAGER, hf.SDPA)


def test_half_of_a_model_is_not_mixed_silently() -> None:
    class OwnAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-2, -1)).softmax(-1) @ x

    model = plain("bert")
    model.bert.add_module("extra", OwnAttention())
    assert "bert.extra" in str(find_sites(model)[1]) and "does not ask" in str(find_sites(model)[1])
    model = plain("clip")
    inputs = {key: value for key, value in tiny_inputs("clip").items() if key != "pixel_values"}
    sites, refusal = find_sites(model.text_model, inputs)
    assert len(sites) == 2 and refusal is None
    model = plain("bert")  # a layer that the forward never reaches
    model.bert.add_module("unused", copy.deepcopy(model.bert.encoder.layer[0].attention.self))
    assert "bert.unused (BertSelfAttention) did not ask the interface in a forward with input_ids" in str(
        find_sites(model)[1]
    )
    model = plain("gpt2")
    model.config.reorder_and_upcast_attn = True
    assert "reorder_and_upcast_attn" in str(find_sites(model)[1])
    assert find_sites(nn.Linear(2, 2)) == ([], "Linear is not a model of transformers")


def test_maps_that_are_not_what_multiplies_the_values_are_refused(monkeypatch: Any) -> None:
    import transformers.models.llama.modeling_llama as file

    def twice(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, maps = eager(*args, **kwargs)
        return output, 2 * maps

    def flat(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, maps = eager(*args, **kwargs)
        return output, maps.flatten(0, 1)

    eager = file.eager_attention_forward
    for function, reason in ((twice, "does not multiply the maps that it returns"), (flat, "not \\(batch, heads")):
        monkeypatch.setattr(file, "eager_attention_forward", function)
        with pytest.raises(UserError, match=f"model.layers.0.self_attn .LlamaAttention. .*{reason}"):
            Coeff().attach(describe(plain("llama")))


def test_masks_that_are_not_built_refuse_the_model(monkeypatch: Any) -> None:
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, hf.PROBE)
    assert "is causal, but transformers built no mask for it" in str(find_sites(plain("llama"))[1])


def test_a_forward_that_fails_is_said() -> None:
    _, refusal = find_sites(plain("bert"), {"input_ids": torch.full((1, 3), VOCAB + 5)})
    assert "could not look for the attention layers of BertForSequenceClassification, because a forward failed" in str(
        refusal
    )

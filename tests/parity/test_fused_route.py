"""The two routes of a timm attention layer: over its maps, and without them."""

import copy
import importlib
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from tiny import FAMILIES, as_backbone, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn

from coeft.adapt import Attachment, Stack
from coeft.attention import timm_fused
from coeft.attention.mixer import CoeffMixer
from coeft.attention.timm import BOTH_ROUTES, ROUTE, find_sites
from coeft.methods.coeff import Coeff
from coeft.methods.lora import LoRA

BOTH = [
    "vit",
    "vit_relpos",
    "vit_parallel",
    "vit_parallel_scaling",
    "deit3",
    "dinov2_registers",
    "dinov3",
    "eva02",
    "pe",
    "beit",
    "beitv2",
    "siglip",
    "qwen3",
]


@cache
def _plain(family: str) -> nn.Module:
    return tiny_model(family)


def plain(family: str) -> nn.Module:
    return copy.deepcopy(_plain(family))


def set_random(attachment: Attachment, std: float = 0.5) -> None:
    draw = torch.Generator().manual_seed(0)
    for parameter in attachment.parameters.values():
        parameter.data = std * torch.randn(parameter.shape, generator=draw).to(parameter)


def take(model: nn.Module, route: str) -> list[CoeffMixer]:
    """Send every layer of the model one way."""
    mixers = [module for module in model.modules() if isinstance(module, CoeffMixer)]
    for mixer in mixers:
        mixer.route = route
    return mixers


def both(family: str, model: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    backbone = as_backbone(plain(family) if model is None else model)
    stack = Stack({"coeff": Coeff(**settings)})
    stack.attach(backbone, 0)
    set_random(stack.attachments[0])
    return backbone.model.eval(), stack.attachments[0].parameters


def count_maps(model: nn.Module) -> list[Tensor]:
    """What passes through the softmax's dropout, by a hook that does not count as somebody who wants the maps."""
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, CoeffMixer):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0]) if len(args) == 1 else None)
    return seen


def test_the_table_is_of_the_installed_timm() -> None:
    for name, (_, digest) in timm_fused.FUSED.items():
        module, _, cls = name.rpartition(".")
        assert timm_fused.digest(getattr(importlib.import_module(module), cls)) == digest, f"read {name} again"
    taken = {
        f"{type(s.module).__module__}.{type(s.module).__qualname__}" for f in BOTH for s in find_sites(plain(f))[0]
    }
    assert taken == set(timm_fused.FUSED)


@pytest.mark.parametrize("family", BOTH)
def test_both_routes_give_equal_outputs_and_gradients(family: str) -> None:
    model, alphas = both(family, plain(family).double())
    images = tiny_images(family).double()
    seen = count_maps(model)
    results = []
    for route in ("maps", "fused"):
        mixers = take(model, route)
        seen.clear()
        out = model(images)
        assert len(seen) == (len(mixers) if route == "maps" else 0)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(alphas.values()))))
    for maps, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, maps, rtol=1e-8, atol=1e-8 * float(maps.detach().abs().max()))
    assert all(g.abs().max() > 1e-6 for g in results[0][1:])


def test_masks_and_causal_attention() -> None:
    model, _ = both("vit", plain("vit").double())
    attention: Any = model.get_submodule("blocks.0.attn")
    x = torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[..., 0] = True
    bias = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    for options in ({"attn_mask": seen}, {"attn_mask": bias}, {"is_causal": True}):
        take(model, "maps")
        expected = attention(x, **options)
        take(model, "fused")
        torch.testing.assert_close(attention(x, **options), expected, rtol=1e-10, atol=1e-10)


def test_auto_goes_by_the_number_of_tokens() -> None:
    small, large = CoeffMixer(6), CoeffMixer(12)
    assert not small.takes_all(64, 17, 17) and large.takes_all(16, 197, 197) and not large.takes_all(1, 50, 50)
    assert not large.takes_all(16, 1, 4096)  # one new token after a cache
    model, _ = both("vit", tiny_model("vit", img_size=128))
    seen = count_maps(model)
    model(torch.randn(2, 3, 128, 128))  # 257 tokens, 3 heads: few enough for the cache
    assert len(seen) == 2
    seen.clear()
    model(torch.randn(6, 3, 128, 128))
    assert not seen


def test_somebody_who_hooks_the_maps_sees_them() -> None:
    model, _ = both("vit")
    take(model, "fused")
    expected = model(tiny_images("vit"))
    seen: list[Tensor] = []
    module: Any = model.get_submodule("blocks.1.attn")
    module.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(model(tiny_images("vit")), expected, rtol=1e-4, atol=1e-5)
    assert seen[0].shape == (2, 3, 17, 17)


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit"])
def test_the_guard_holds_on_the_fused_route(family: str) -> None:
    model, _ = both(family)
    take(model, "fused")
    model(tiny_images(family))
    name = next(name for name, m in model.named_modules() if hasattr(m, "coeff_mix"))
    module: Any = model.get_submodule(name)
    module.fused_attn = True
    with pytest.raises(RuntimeError, match=f"{name}: the attention maps did not pass"):
        model(tiny_images(family))
    module.fused_attn = False
    module.attn_drop = nn.Dropout(0.0)
    with pytest.raises(RuntimeError, match="did not pass"):
        model(tiny_images(family))


def test_copies_and_pickles_act_on_their_own_coefficients() -> None:
    model, _ = both("vit")
    take(model, "fused")
    images = tiny_images("vit")
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        for name, parameter in other.named_parameters():
            if name.endswith("coeff_alpha"):
                parameter.data.zero_()
        torch.testing.assert_close(other(images), plain("vit")(images), rtol=1e-4, atol=2e-5)
        assert torch.equal(model(images), expected)


def test_gradient_checkpointing_and_coefficient_dropout() -> None:
    grads = []
    for route in ("maps", "fused"):
        for checkpointing in (False, True):
            model, alphas = both("vit", plain("vit").double(), dropout=0.4)
            take(model.train(), route)
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(0)
            out = model(tiny_images("vit").double())
            grads.append(torch.autograd.grad(out.square().sum(), list(alphas.values())))
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_compile() -> None:
    model, alphas = both("vit")
    mixers = take(model, "fused")
    images = tiny_images("vit")
    expected = model(images)
    wanted = torch.autograd.grad(expected.square().sum(), list(alphas.values()))
    seen = count_maps(model)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager")(images)
    assert not seen and len(mixers) == 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for one, two in zip(torch.autograd.grad(got.square().sum(), list(alphas.values())), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "beit", "dinov3"])
def test_stacked_with_lora(family: str) -> None:
    """LoRA on qkv is called on both routes, also where timm reads the weight past the layer."""
    backbone = tiny_backbone(family)
    stack = Stack({"coeff": Coeff(dropout=0.0), "lora": LoRA(rank=2)})
    stack.attach(backbone, 0)
    for attachment in stack.attachments:
        set_random(attachment, std=0.3)
    model = backbone.model.double().eval()
    images = tiny_images(family).double()
    outputs = []
    for route in ("maps", "fused"):
        take(model, route)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)


def test_a_changed_or_replaced_forward_keeps_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("vit")
    assert {site.route for site in find_sites(model)[0]} == {BOTH_ROUTES}
    attention: Any = model.get_submodule("blocks.0.attn")
    attention.forward = attention.forward
    assert [site.route for site in find_sites(model)[0]] == [ROUTE, BOTH_ROUTES]
    key = "timm.layers.attention.Attention"
    monkeypatch.setitem(timm_fused.FUSED, key, (timm_fused.FUSED[key][0], "another"))
    assert {site.route for site in find_sites(plain("vit"))[0]} == {ROUTE}


def test_families_without_the_fused_route_show_the_maps() -> None:
    for family in set(FAMILIES) & {"swin", "cait", "convit"}:
        assert {site.route for site in find_sites(plain(family))[0]} == {ROUTE}

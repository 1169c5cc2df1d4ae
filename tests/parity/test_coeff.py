"""Coeff-Tuning on timm models: against plain timm, an independent layer, and by its properties, family by family."""

import copy
from functools import cache
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load, save
from timm.layers.attention2d import Attention2d
from tiny import FAMILIES, as_backbone, tiny_backbone, tiny_images, tiny_model
from torch import Tensor, nn

from coeft.adapt import Attachment, Stack
from coeft.attention.mixer import CoeffMixer
from coeft.attention.timm import find_sites
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.methods.coeff import Coeff


@cache
def _plain(family: str) -> nn.Module:
    return tiny_model(family)


def plain(family: str) -> nn.Module:
    return copy.deepcopy(_plain(family))


def attached(family: str, model: nn.Module | None = None, **settings: Any) -> tuple[Backbone, Attachment]:
    """A model of the family with coeff alone trainable."""
    backbone = as_backbone(plain(family) if model is None else model, FAMILIES[family].name, FAMILIES[family].image)
    stack = Stack({"coeff": Coeff(**settings)})
    stack.attach(backbone, 0)
    return backbone, stack.attachments[0]


def set_random(attachment: Attachment, std: float = 0.5, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters.values():
        parameter.data = std * torch.randn(parameter.shape, generator=draw).to(parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_plain_timm_and_anything_else_is_not(family: str) -> None:
    before, images = plain(family), tiny_images(family)
    names = set(before.state_dict())
    backbone, attachment = attached(family)
    model = backbone.model.eval()
    assert [site.num_heads for site in backbone.sites] == [p.shape[0] for p in attachment.parameters.values()]
    assert len(backbone.sites) == FAMILIES[family].sites
    assert {site.num_heads for site in backbone.sites} == FAMILIES[family].heads
    assert set(model.state_dict()) - names == set(attachment.parameters)
    assert sum(p.num_parameters for p in attachment.places) == sum(site.num_heads**2 for site in backbone.sites)
    with torch.no_grad():
        expected = before(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=2e-5)
        set_random(attachment)
        assert (model(images) - expected).abs().max() > 0.05 * expected.std()


def test_attention_of_custom_efficientnets() -> None:
    """timm.layers.Attention2d, which no registered model has."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention2d(24, num_heads=3)).eval()
    images = torch.randn(2, 24, 5, 7)
    expected = model(images)
    (site,) = find_sites(model)[0]
    mixer = CoeffMixer(site.num_heads)
    site.install(mixer.eval())
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    mixer.set_alpha(torch.randn(3, 3))
    assert (model(images) - expected).abs().max() > 0.05 * expected.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixer_is_called_in_order_and_every_alpha_gets_a_gradient(family: str) -> None:
    backbone, attachment = attached(family)
    model = backbone.model.eval()  # stochastic depth and dropout of alpha may leave a layer without a gradient
    calls: list[str] = []
    for place, mixer in attachment.probes.items():
        mixer.register_forward_hook(lambda *_, place=place: calls.append(place))
    model(tiny_images(family)).square().mean().backward()
    assert calls == [site.name for site in backbone.sites]
    for name, parameter in model.named_parameters():
        if name in attachment.parameters:
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name
        elif not name.startswith(f"{backbone.head}."):
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_the_sites(family: str) -> None:
    backbone = tiny_backbone(family) if family == "vit" else as_backbone(plain(family))
    blocks = backbone.blocks
    assert len(set(blocks)) == len(blocks) > 0
    for site in backbone.sites:
        assert sum(site.name == block or site.name.startswith(f"{block}.") for block in blocks) == 1
    assert isinstance(backbone.model.get_submodule(backbone.head), nn.Linear | nn.ModuleList)


def layer(attention: Any, x: Tensor, coeff: Tensor) -> Tensor:
    """A ViT attention layer, one head at a time, from its weights."""
    H, C = coeff.shape[0], x.shape[-1]
    d = C // H
    w, b = attention.qkv.weight, attention.qkv.bias
    q, k, v = (x @ w[i * C : (i + 1) * C].T + b[i * C : (i + 1) * C] for i in range(3))
    maps = []
    for h in range(H):
        scores = q[..., h * d : (h + 1) * d] @ k[..., h * d : (h + 1) * d].transpose(-2, -1) / d**0.5
        weights = scores.exp()
        maps.append(weights / weights.sum(-1, keepdim=True))
    heads = [sum(coeff[g, h] * maps[h] for h in range(H)) @ v[..., g * d : (g + 1) * d] for g in range(H)]
    return torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias


def test_the_mixed_layer_of_a_vit_equals_its_formula_with_all_gradients() -> None:
    backbone, attachment = attached("vit", plain("vit").double())
    set_random(attachment)
    site = backbone.sites[1]
    x = torch.randn(2, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    target = torch.randn(2, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    alpha = attachment.parameters[f"{site.name}.coeff_mix.coeff_alpha"]
    alpha.data = alpha.data.double()
    for parameter in site.module.parameters():
        parameter.requires_grad_(True)
    wanted_of = [x, *site.module.parameters()]
    got = site.module(x)
    expected = layer(site.module, x, torch.eye(3, dtype=torch.float64) + alpha)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad((got * target).sum(), wanted_of)
    theirs = torch.autograd.grad((expected * target).sum(), wanted_of)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["vit", "dinov2", "deit3", "siglip", "swin"])
def test_a_permutation_is_the_same_as_permuted_queries_and_keys(family: str) -> None:
    """alpha' = P against plain timm whose q and k projections (and position biases by head) are permuted by P."""
    backbone, attachment = attached(family)
    permuted, images = plain(family), tiny_images(family)
    unmoved = permuted(images)
    modules = dict(permuted.named_modules())
    for site in backbone.sites:
        H = site.num_heads
        order = torch.arange(H).roll(1)
        alpha = attachment.parameters[f"{site.name}.coeff_mix.coeff_alpha"]
        alpha.data = torch.eye(H)[order] - torch.eye(H)
        attention: Any = modules[site.name]
        with torch.no_grad():
            for tensor in (attention.qkv.weight, attention.qkv.bias):
                parts = tensor.view(3, H, -1, *tensor.shape[1:])
                parts[:2] = parts[:2, order].clone()
            if family == "swin":
                table = attention.relative_position_bias_table
                table.copy_(table[:, order].clone())
    with torch.no_grad():
        expected = permuted(images)
        torch.testing.assert_close(backbone.model.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert (expected - unmoved).abs().max() > 0.05 * unmoved.std()


def test_masked_windows_of_swin_stay_masked() -> None:
    """The shifted layer of Swin masks pairs of tokens from different regions: mixed maps are zero there (exp(-100))."""
    backbone, attachment = attached("swin")
    set_random(attachment)
    seen: list[Tensor] = []
    module: Any = backbone.sites[1].module
    attention_in: list[tuple] = []
    module.coeff_mix.register_forward_hook(lambda m, a, out: seen.append(out))
    module.register_forward_pre_hook(lambda m, a, k: attention_in.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        backbone.model.eval()(tiny_images("swin"))
    mask = attention_in[0][1].get("mask", attention_in[0][0][1] if len(attention_in[0][0]) > 1 else None)
    hidden = (mask < 0).repeat(seen[0].shape[0] // mask.shape[0], 1, 1).unsqueeze(1).expand_as(seen[0])
    assert hidden.any() and (seen[0][hidden].abs() < 1e-30).all() and seen[0][~hidden].abs().min() > 1e-12


def test_a_masked_token_of_a_vit_changes_nothing_to_the_bit() -> None:
    backbone, attachment = attached("vit")
    set_random(attachment)
    attention: Any = backbone.sites[0].module
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 6] += 5
    for hidden in (-torch.inf, False):
        mask = torch.ones(9, 9, dtype=torch.bool) if hidden is False else torch.zeros(9, 9)
        mask[:, 6] = hidden
        keep = torch.arange(9) != 6
        with torch.no_grad():
            assert torch.equal(attention(x, attn_mask=mask)[:, keep], attention(other, attn_mask=mask)[:, keep])
            assert not torch.equal(attention(x)[:, keep], attention(other)[:, keep])


def test_a_layer_reaches_beyond_the_convex_hull_of_its_values() -> None:
    """Target: minus the layer's own output before projection. No attention map gives it; alpha' = -I does."""
    backbone, attachment = attached("vit", dropout=0.0)
    attention: Any = backbone.sites[0].module
    x = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    attention.proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        attention(x)
    target = -seen[0]
    optimizer = torch.optim.Adam([attention.coeff_mix.coeff_alpha], lr=0.05)
    losses = []
    for _ in range(300):
        seen.clear()
        attention(x)
        loss = (seen[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.1 and losses[-1] < 1e-4
    torch.testing.assert_close(attention.coeff_mix.alpha().detach(), -2 * torch.eye(3), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_base_patch16_224", 1728), ("vit_large_patch16_224", 6144), ("vit_small_patch14_dinov2", 432)],
)
def test_trainable_parameters_are_those_of_the_paper(name: str, count: int) -> None:
    with torch.device("meta"):
        backbone = as_backbone(timm.create_model(name, num_classes=0), name)
    stack = Stack({"coeff": Coeff()})
    stack.attach(backbone, 0)
    assert sum(p.numel() for p in backbone.model.parameters() if p.requires_grad) == count
    assert sum(row.parameters for row in stack.report()) == count


def mixing(mixer: CoeffMixer) -> Tensor:
    """alpha' of one forward: maps of head h are the h-th unit vector."""
    H = mixer.num_heads
    return mixer(torch.eye(H).view(1, H, 1, H)).view(H, H)


def test_dropout_drops_entries_of_alpha_and_never_the_identity() -> None:
    mixer = CoeffMixer(7, dropout=0.25)
    alpha = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) + 3
    mixer.set_alpha(alpha)
    torch.manual_seed(0)
    draws = torch.stack([mixing(mixer).detach() for _ in range(4000)]) - torch.eye(7)
    kept = draws.abs() > 1e-5
    torch.testing.assert_close(draws[kept], (alpha / 0.75).expand_as(draws)[kept], rtol=1e-4, atol=1e-4)
    assert abs(kept.float().mean() - 0.75) < 0.005
    torch.testing.assert_close(draws.mean(0), alpha, rtol=0.06, atol=0)  # 6 sd of the mean of 4,000 draws
    mixer.eval()
    torch.testing.assert_close(mixing(mixer).detach(), torch.eye(7) + alpha)
    assert torch.equal(mixing(mixer), mixing(mixer))
    mixer.train().set_alpha(torch.zeros(7, 7))
    assert torch.equal(mixing(mixer).detach(), torch.eye(7))


def test_dropout_of_a_model_is_one_draw_a_layer_and_none_in_eval() -> None:
    backbone, attachment = attached("vit", dropout=0.5)
    set_random(attachment)
    images, model = tiny_images("vit"), backbone.model
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(images), model(images))
        model.train()
        torch.manual_seed(0)
        first, second = model(images), model(images)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        twice = model(torch.cat([images[:1], images[:1]]))
    torch.testing.assert_close(twice[0], twice[1])  # the same coefficients for every image of a batch


def test_init() -> None:
    eye = torch.eye(5)
    residual, identity = CoeffMixer(5), CoeffMixer(5, init="identity")
    torch.manual_seed(0)
    random = CoeffMixer(101, init="random")
    assert torch.equal(residual.coeff_alpha, torch.zeros(5, 5)) and torch.equal(identity.coeff_alpha, eye)
    assert abs(random.coeff_alpha.std() * 101**0.5 - 1) < 0.03 and abs(random.coeff_alpha.mean()) < 0.003
    torch.testing.assert_close(mixing(random.eval()).detach(), random.coeff_alpha.detach(), rtol=1e-5, atol=1e-6)
    for mixer in (residual, identity):
        assert torch.equal(mixing(mixer.eval()).detach(), eye) and torch.equal(mixer.alpha(), torch.zeros(5, 5))
    alpha = torch.randn(5, 5)
    for mixer in (residual, identity):
        mixer.set_alpha(alpha)
        torch.testing.assert_close(mixer.alpha().detach(), alpha)
        torch.testing.assert_close(mixing(mixer).detach(), eye + alpha)
    dropped = CoeffMixer(5, init="identity", dropout=0.5)
    torch.manual_seed(0)
    draws = torch.stack([mixing(dropped).detach().diagonal() for _ in range(100)])
    assert set(draws.flatten().tolist()) == {0.0, 2.0}  # there the identity is dropped


def test_weight_decay_pulls_the_residual_to_the_identity_and_the_full_matrix_to_zero() -> None:
    for init, end in (("residual", torch.eye(3)), ("identity", torch.zeros(3, 3))):
        mixer = CoeffMixer(3, init=init).eval()
        optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.5, weight_decay=1.0)
        for _ in range(40):
            mixer.coeff_alpha.grad = torch.zeros(3, 3)
            optimizer.step()
        torch.testing.assert_close(mixing(mixer).detach(), end, atol=1e-4, rtol=0)


def test_half_precision_rounds_once() -> None:
    maps = torch.rand(3, 4, 50, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixer = CoeffMixer(4).eval()
    assert torch.equal(mixer(maps), maps) and mixer(maps).dtype == torch.bfloat16
    alpha = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).mul(0.05).bfloat16().float()
    mixer.set_alpha(alpha)
    exact = torch.einsum("gh,bhnm->bgnm", torch.eye(4).double() + alpha.double(), maps.double())
    assert ((mixer(maps).double() - exact).abs() <= 2**-8 * exact.abs() * 1.01).all()


def test_small_coefficients_count_under_autocast() -> None:
    maps = torch.rand(3, 4, 50, 60, generator=torch.Generator().manual_seed(0))
    mixer = CoeffMixer(4).eval()
    mixer.set_alpha(1e-4 * torch.ones(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(maps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, maps + 1e-4 * maps.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["vit", "dinov3", "swin", "maxvit"])
def test_autocast_and_models_in_half_precision(family: str) -> None:
    backbone, attachment = attached(family)
    set_random(attachment, std=0.2)
    images, model = tiny_images(family), backbone.model.eval()
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(images)
        halved = model.bfloat16()(images.bfloat16())
    assert halved.dtype == torch.bfloat16
    for got in (cast, halved):
        assert (got.float() - expected).abs().mean() < 0.15 * expected.std()


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (6, 5, 5), (2, 1, 3, 5, 5)])
def test_maps_of_another_layout_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"blocks.7.attn: expected attention maps \(batch, 3 heads, .*, got \["):
        CoeffMixer(3, site="blocks.7.attn")(torch.zeros(shape))


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit", "swin", "maxvit"])
def test_fused_attention_switched_back_on_is_an_error(family: str) -> None:
    backbone, _ = attached(family)
    model, images = backbone.model, tiny_images(family)
    model(images)
    module: Any = backbone.sites[-1].module
    module.fused_attn = True
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=f"{backbone.sites[-1].name}: the attention maps did not pass"):
            model.train(mode)(images)
    module.fused_attn = False
    model(images)


def test_the_guard_holds_after_an_interrupted_forward_and_a_replaced_dropout() -> None:
    backbone, _ = attached("vit")
    module: Any = backbone.sites[0].module

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = module.proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        backbone.model(tiny_images("vit"))
    handle.remove()
    module.attn_drop = nn.Dropout(0.0)
    with pytest.raises(RuntimeError, match="did not pass through the coeff mixer"):
        backbone.model(tiny_images("vit"))


def test_deepcopy_acts_on_its_own_coefficients() -> None:
    backbone, attachment = attached("vit")
    set_random(attachment)
    model, images = backbone.model.eval(), tiny_images("vit")
    with torch.no_grad():
        expected = model(images)
        other = copy.deepcopy(model)
        assert torch.equal(other(images), expected)
        for name, parameter in other.named_parameters():
            if name.endswith("coeff_alpha"):
                parameter.zero_()
        torch.testing.assert_close(other(images), plain("vit")(images), rtol=1e-4, atol=2e-5)
        assert torch.equal(model(images), expected)
    copied: Any = other.get_submodule(backbone.sites[0].name)
    copied.fused_attn = True
    with pytest.raises(RuntimeError, match="did not pass"):
        other(images)
    model(images)


@pytest.mark.parametrize("family", ["vit", "dinov3", "swin", "swinv2", "cait", "beit", "maxvit"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        backbone, attachment = attached(family)
        set_random(attachment)
        model: Any = backbone.model.train()
        model.set_grad_checkpointing(checkpointing)
        for module in model.modules():  # no other random draws than those of the coefficients
            if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
                module.eval()
        torch.manual_seed(7)
        model(tiny_images(family)).square().mean().backward()
        grads.append([p.grad for p in attachment.parameters.values()])
        model(tiny_images(family))  # and the guard is in order afterwards
        module = backbone.sites[0].module
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = True
            with pytest.raises(RuntimeError, match="did not pass"):
                model(tiny_images(family))
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_compile_follows_the_coefficients_and_keeps_the_guard() -> None:
    backbone, attachment = attached("vit")
    model, images = backbone.model.eval(), tiny_images("vit")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            set_random(attachment, seed=seed)
            with torch.no_grad():
                expected = model(images)
                torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    trained = torch.compile(copy.deepcopy(model).train(), backend="aot_eager")
    trained(images).square().mean().backward()
    grads = [p.grad for name, p in trained.named_parameters() if "coeff_alpha" in name]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    module: Any = backbone.sites[0].module
    module.fused_attn = True
    with pytest.raises(Exception, match="did not pass"):
        compiled(images)


def test_layers_chooses_sites() -> None:
    everything = [f"blocks.{i}.attn" for i in range(2)] + [f"blocks_token_only.{i}.attn" for i in range(2)]
    assert [p.name for p in attached("cait")[1].places] == everything
    assert [p.name for p in attached("cait", layers=[-1, 0])[1].places] == ["blocks.0.attn", "blocks_token_only.1.attn"]
    backbone, attachment = attached("cait", layers=["token_only"])
    assert [p.name for p in attachment.places] == everything[2:]
    assert [n for n, m in backbone.model.named_modules() if isinstance(m, CoeffMixer)] == [
        f"{name}.coeff_mix" for name in everything[2:]
    ]
    with pytest.raises(UserError, match="peft.coeff.layers: there is no layer 4; indices are 0 to 3"):
        attached("cait", layers=[4])
    with pytest.raises(UserError, match="'block_token' matches no layer"):
        attached("cait", layers=["block_token"])


@pytest.mark.parametrize("init", ["residual", "identity", "random"])
def test_the_portable_form_holds_alpha_and_restores_the_outputs(init: str) -> None:
    backbone, attachment = attached("swin", init=init)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    config, tensors = attachment.pack()
    assert config["peft_type"] == "COEFF" and config["convention"] == "alpha" and config["init"] == init
    assert config["target_modules"] == [site.name for site in backbone.sites]
    images = tiny_images("swin")
    for site in backbone.sites:
        alpha = tensors[f"base_model.model.{site.name}.coeff_mix.coeff_alpha"]
        mixer = attachment.probes[site.name]
        assert isinstance(mixer, CoeffMixer)
        expected = torch.eye(site.num_heads) + alpha
        torch.testing.assert_close(mixing(mixer.eval()).detach(), expected, atol=1e-6, rtol=1e-5)
    other, second = attached("swin")  # the same file fills a mixer of any init
    second.unpack(config, load(save(tensors)))
    with torch.no_grad():
        ours, theirs = other.model.eval()(images), backbone.model.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if init == "residual":
        assert torch.equal(ours, theirs)


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    backbone, attachment = attached("vit")
    config, tensors = attachment.pack()
    first, second = tensors
    before = {name: parameter.clone() for name, parameter in attachment.parameters.items()}
    wrong = [
        ({first: torch.ones(3, 3)}, f"{second} is missing"),
        (tensors | {"x": torch.ones(3, 3)}, "x is unexpected"),
        ({first: torch.ones(3, 3), second: torch.ones(4, 4)}, r"is \[4, 4\], not \[3, 3\]"),
    ]
    for given, message in wrong:
        with pytest.raises(UserError, match=message):
            attachment.unpack(config, given)
    with pytest.raises(UserError, match="'alpha_plus_identity', but coeft reads 'alpha'"):
        attachment.unpack(config | {"convention": "alpha_plus_identity"}, tensors)
    assert all(torch.equal(before[name], parameter) for name, parameter in attachment.parameters.items())


def test_attaching_twice_is_refused() -> None:
    backbone, _ = attached("vit")
    with pytest.raises(UserError, match="blocks.0.attn has a coeff mixer already"):
        Stack({"coeff": Coeff()}).attach(backbone, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, r"peft.coeff.dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"init": "zero"}, "peft.coeff.init must be residual, identity or random, not 'zero'"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Coeff(**settings)


REFUSED = {
    "resnet18": "ResNet has no attention layers between tokens",
    "convnext_atto": "ConvNeXt has no attention layers between tokens",
    "resnet50_clip": "has no attention layers between tokens.*is attention pooling before the head",
    "xcit_nano_12_p8_224": r"blocks.0.attn \(XCA, XCiT\): channel attention",
    "edgenext_xx_small": "channel attention",
    "hiera_tiny_224": r"blocks.0.attn \(MaskUnitAttention, Hiera\): its maps do not pass through an attn_drop",
    "levit_128s": "LeViT.*do not pass through an attn_drop",
    "mvitv2_tiny": "MViT v2.*do not pass through an attn_drop",
    "davit_tiny": "DaViT.*do not pass through an attn_drop",
    "tiny_vit_5m_224": "TinyViT.*do not pass through an attn_drop",
    "nest_tiny": "NesT.*not laid out as",
    "twins_svt_small": "Twins-SVT.*not laid out as",
    "samvit_base_patch16": "SAM.*not laid out as",
    "volo_d1_224": "VOLO.*not laid out as",
    "vit_dpwee_patch16_reg1_gap_256": "pairs of maps are subtracted",
    "vit_dwee_patch16_reg1_gap_256": "pairs of maps are subtracted",
    "coat_tiny": "CoaT.*factorised attention",
    "efficientvit_m0": "EfficientViT",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    backbone = as_backbone(plain("vit"), name)
    backbone.sites, backbone.refusal = find_sites(model)
    assert backbone.sites == []
    with pytest.raises(UserError, match=f"peft.coeff does not fit {name}: .*{REFUSED[name]}"):
        Coeff().attach(backbone)


def test_attention_in_no_table_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-2, -1)).softmax(-1) @ x

    class Changed(timm.layers.Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(x)

    for block in (Own(), Changed(24, 3)):
        model = plain("vit")
        model.add_module("extra", block)
        sites, refusal = find_sites(model)
        assert sites == [] and refusal is not None and "extra" in refusal
        assert "a softmax that coeft's table of classes lacks" in refusal
    model = plain("vit")
    model.add_module("extra", nn.MultiheadAttention(24, 3))
    assert "torch.nn.MultiheadAttention" in str(find_sites(model)[1])

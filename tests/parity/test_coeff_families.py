"""Point 2 for every family of timm: what the layer computes with α against maps mixed by explicit sums, in float64."""

import copy

import pytest
import torch
from tiny import FAMILIES, as_backbone, tiny_images, tiny_model
from torch import Tensor, nn

from coeft.adapt import Stack
from coeft.methods.coeff import Coeff


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_maps_mixed_by_hand(family: str) -> None:
    mixed = as_backbone(tiny_model(family).double().eval())
    plain = copy.deepcopy(mixed.model)
    seen: dict[str, list[Tensor]] = {}
    for site in mixed.sites:  # hooked before the mixer, so that these are the layer's own maps

        def keep(module: nn.Module, args: object, maps: Tensor, name: str = site.name) -> None:
            seen.setdefault(name, []).append(maps.detach())

        site.module.attn_drop.register_forward_hook(keep)
    Stack({"coeff": Coeff()}).attach(mixed, seed=0)
    mixed.model.double().eval()
    generator = torch.Generator().manual_seed(0)
    alphas: dict[str, Tensor] = {}
    for site in mixed.sites:
        alpha = 0.3 * torch.randn(site.num_heads, site.num_heads, generator=generator, dtype=torch.float64)
        site.module.coeff_mix.set_alpha(alpha)
        alphas[site.name] = alpha
    images = tiny_images(family).double()
    with torch.no_grad():
        output = mixed.model(images)
    for site in mixed.sites:
        module = plain.get_submodule(site.name)
        if hasattr(module, "fused_attn"):
            module.fused_attn = False

        def mix(module: nn.Module, args: object, maps: Tensor, name: str = site.name) -> Tensor:
            own = seen[name].pop(0)
            coeff = torch.eye(len(alphas[name]), dtype=torch.float64) + alphas[name]
            return torch.stack([sum(coeff[g, h] * own[:, h] for h in range(len(coeff))) for g in range(len(coeff))], 1)

        module.attn_drop.register_forward_hook(mix)
    with torch.no_grad():
        expected = plain(images)
    assert not any(seen.values())  # every layer of both was called equally often
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

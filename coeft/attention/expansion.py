"""Head expansion of a backbone with mixers, of either kind."""

from typing import Any, cast

import torch
from torch import Tensor

from coeft.attention.mixer import CoeffMixer
from coeft.attention.site import AttentionSite
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.expand import Heads


def mixing(site: AttentionSite) -> Tensor | None:
    """I + alpha of a layer, (H, H) float64; None where it has no mixer."""
    mixer = getattr(site.module, "coeff_mix", None)
    if not isinstance(mixer, CoeffMixer):
        return None
    alpha = mixer.alpha().detach().double().cpu()
    return alpha + torch.eye(len(alpha), dtype=alpha.dtype)


def check_expandable(backbone: Backbone) -> None:
    """Refuse a backbone whose mixed layers cannot be written as plain layers with more heads.

    Raises:
        UserError: names the classes and the alternative.
    """
    if backbone.kind == "hf":
        from coeft.attention import expand_hf

        reason = expand_hf.refusal(backbone.model, backbone.sites)
    else:
        from coeft.attention import expand_timm

        mixed = [site for site in backbone.sites if mixing(site) is not None]
        reason = next((why for site in mixed if (why := expand_timm.refusal(site.module))), None)
    if reason is not None:
        raise UserError(f"--coeff expand does not fit {backbone.name}: {reason}; take --coeff keep")


def expand_backbone(backbone: Backbone, threshold: float = 0.0) -> tuple[dict[str, Heads], dict[str, Any]]:
    """Fold the mixers of a backbone into weights of layers with more heads, in place; see coeft.expand.

    The model cannot run any more: its state dict is for `expand_timm.load`, or with its config for save_pretrained.

    Returns:
        Name of each rewritten layer -> its heads; and for timm, name -> arguments of its class.

    Raises:
        UserError: the model's classes cannot hold the result.
    """
    check_expandable(backbone)
    mixings = {site.name: found for site in backbone.sites if (found := mixing(site)) is not None}
    arguments: dict[str, Any] = {}
    if backbone.kind == "hf":
        from coeft.attention import expand_hf

        heads = expand_hf.rewrite(backbone.model, backbone.sites, mixings, threshold)
    else:
        from coeft.attention import expand_timm

        heads = {}
        for site in backbone.sites:
            if site.name in mixings:
                heads[site.name], arguments[site.name] = expand_timm.rewrite(site.module, mixings[site.name], threshold)
    for site in backbone.sites:
        cast(Any, site.module)._modules.pop("coeff_mix", None)
    return heads, arguments

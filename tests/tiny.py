"""Small models of every family of timm that coeff supports, with random weights large enough for effects to show."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from coeft.attention.timm import find_sites
from coeft.backbones._backbone import Backbone, Preprocessing
from coeft.backbones._timm import block_names, head_name

CLASSES = 5


@dataclass(frozen=True)
class Family:
    """A small model: its name in timm, how to shrink it, and what coeft must find in it."""

    name: str
    sites: int
    """Attention layers that can be mixed."""
    heads: set[int]
    options: dict[str, Any] = field(default_factory=dict)
    image: int = 32
    """Pixels of a side."""


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "window_size": 4}
CROSS = {
    "img_size": 48,
    "img_scale": (1.0, 2 / 3),
    "patch_size": (12, 16),
    "embed_dim": (24, 48),
    "depth": ((1, 2, 0),),
    "num_heads": (3, 3),
}

FAMILIES = {
    "vit": Family("vit_tiny_patch16_224", 2, {3}, VIT),
    "vit_registers": Family("vit_medium_patch16_reg4_gap_256", 2, {3}, VIT),
    "vit_relpos": Family("vit_relpos_small_patch16_224", 2, {3}, VIT),
    "vit_parallel": Family("vit_small_patch16_18x2_224", 4, {3}, VIT),
    "vit_parallel_scaling": Family("vit_pwee_patch16_reg1_gap_256", 2, {3}, VIT),
    "deit3": Family("deit3_small_patch16_224", 2, {3}, VIT),
    "dinov2": Family("vit_small_patch14_dinov2", 2, {3}, VIT),
    "dinov2_registers": Family("vit_small_patch14_reg4_dinov2", 2, {3}, VIT),
    "dinov3": Family("vit_small_patch16_dinov3", 2, {3}, VIT),
    "eva02": Family("eva02_tiny_patch14_224", 2, {3}, VIT),
    "pe": Family("vit_pe_core_tiny_patch16_384", 2, {3}, VIT),
    "beit": Family("beit_base_patch16_224", 2, {3}, VIT),
    "beitv2": Family("beitv2_base_patch16_224", 2, {3}, VIT),
    "siglip": Family("vit_base_patch16_siglip_224", 2, {3}, VIT),
    "swin": Family("swin_tiny_patch4_window7_224", 4, {2, 3}, SWIN),
    "swinv2": Family("swinv2_tiny_window8_256", 4, {2, 3}, SWIN),
    "swinv2_cr": Family("swinv2_cr_tiny_224", 4, {2, 3}, SWIN),
    "cait": Family("cait_xxs24_224", 4, {3}, VIT),
    "crossvit": Family("crossvit_tiny_240", 5, {3}, CROSS, image=48),
    "convit": Family("convit_tiny", 2, {3}, VIT | {"local_up_to_layer": 1}),
    "maxvit": Family("test_maxvit", 8, {1, 2, 3, 4}, {"img_size": 64}, image=64),
    "coatnet": Family("test_coatnet", 3, {2, 3}, {"img_size": 64}, image=64),
    "fastvit": Family("fastvit_sa12", 1, {16}, {"layers": (1, 1, 1, 1)}, image=64),
    "gcvit": Family("gcvit_xxtiny", 12, {2, 4, 8, 16}, {"img_size": 64}, image=64),
    "caformer": Family("caformer_s18", 12, {10, 16}, image=64),
    "nextvit": Family("nextvit_small", 4, {6, 12, 24}, image=64),
    "visformer": Family(
        "visformer_tiny", 2, {3}, {"img_size": 64, "embed_dim": 24, "init_channels": 8, "depth": (1, 1, 1)}, image=64
    ),
    "tnt": Family("tnt_s_legacy_patch16_224", 2, {4, 6}, {"img_size": 32, "embed_dim": 48, "depth": 1}),
    "pvtv2": Family("pvt_v2_b0", 4, {1, 2, 5, 8}, {"depths": (1, 1, 1, 1)}, image=64),
    "twins_pcpvt": Family("twins_pcpvt_small", 4, {1, 2, 5, 8}, {"depths": (1, 1, 1, 1), "img_size": 64}, image=64),
    "mobilenetv4": Family("mobilenetv4_hybrid_medium", 8, {4}, image=64),
    "qwen3": Family("qwen3_vit_88m", 1, {3}, {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64}, image=64),
    "gemma4": Family(
        "gemma4_vit_167m", 1, {3}, {"depth": 1, "embed_dim": 48, "num_heads": 3, "head_dim": 16, "img_size": 96}, 96
    ),
}


def scale_up(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight anew, so that no zero or tiny start (LayerScale, residual norms, biases) hides an effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            if "logit_scale" in name:
                parameter.add_(0.1 * noise)
            elif parameter.dim() >= 2:
                fan_in = parameter[0].numel() if parameter.dim() in (2, 4) else parameter.shape[-1]
                parameter.copy_(noise * (1.5 if "pos_embed" not in name else 0.5) / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:  # norms, LayerScale
                parameter.copy_(1 + 0.1 * noise)
    return model


def tiny_model(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """A small random model of a family, in eval mode."""
    chosen = FAMILIES[family]
    torch.manual_seed(seed)
    model = timm.create_model(chosen.name, num_classes=CLASSES, **(chosen.options | options))
    return scale_up(model, seed).eval()


def as_backbone(model: nn.Module, name: str = "tiny", image: int = 32) -> Backbone:
    """A model as methods get it."""
    sites, refusal = find_sites(model)
    look = Preprocessing(
        image_size=(image, image), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0
    )
    return Backbone(
        name=name,
        kind="timm",
        model=model,
        preprocessing=look,
        sites=sites,
        refusal=refusal,
        blocks=block_names(model, sites),
        head=head_name(model),
    )


def tiny_backbone(family: str, seed: int = 0, **options: Any) -> Backbone:
    return as_backbone(tiny_model(family, seed, **options), FAMILIES[family].name, FAMILIES[family].image)


def tiny_images(family: str, batch: int = 2, seed: int = 1) -> Tensor:
    """Normalised images (batch, 3, H, W)."""
    side = FAMILIES[family].image
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))

"""How a mixer reaches the attention maps of timm models.

timm's attention classes compute maps = softmax(...) and pass them through `attn_drop` unless `fused_attn` is set. A
mixer is a child of the attention module and a forward hook on `attn_drop`, so no parameter of the model changes its
name. The classes of coeft/attention/timm_fused.py have a second route, without maps. The tables below say, class by
class, where that holds; they were read from timm 1.0.31 and are compared with the installed sources by a test. What is
in no table is refused when it computes a softmax, and never guessed.
"""

import inspect
import re
from collections.abc import Hashable
from functools import cache, partial
from typing import cast

from torch import nn

from coeft.attention import timm_fused
from coeft.attention.mixer import CoeffMixer
from coeft.attention.site import BOTH_ROUTES, AttentionSite, drop_hooks
from coeft.errors import UserError

ROUTE = "maps (attn_drop)"

# class -> families. Post-softmax maps of shape (B, H, N, M), H = module.num_heads, pass through module.attn_drop.
SUPPORTED = {
    "timm.layers.attention.Attention": (
        "ViT (AugReg, CLIP, MAE, DINO, FlexiViT, NaFlexViT), DeiT, DeiT-3, DINOv2 with and without registers, SigLIP, "
        "PiT, CrossViT (within scales), hybrids of ViT and ResNet, MobileViT v1"
    ),
    "timm.layers.attention.AttentionRope": "Perception Encoder (PE), ViT with RoPE, Qwen3 and DeepSeek vision towers",
    "timm.models.vision_transformer.ParallelScalingBlock": "ViT with parallel attention and MLP (ViT-22B style)",
    "timm.models.vision_transformer_relpos.RelPosAttention": "ViT with relative positions",
    "timm.models.eva.EvaAttention": "EVA, EVA-02, DINOv3, RoPE ViTs",
    "timm.models.beit.Attention": "BEiT, BEiT v2",
    "timm.models.swin_transformer.WindowAttention": "Swin",
    "timm.models.swin_transformer_v2.WindowAttention": "Swin v2",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": "Swin v2 (cr)",
    "timm.models.cait.TalkingHeadAttn": "CaiT; mixed after its own pre-trained talking heads",
    "timm.models.cait.ClassAttn": "CaiT (class attention)",
    "timm.models.crossvit.CrossAttention": "CrossViT (across scales)",
    "timm.models.maxxvit.AttentionCl": "MaxViT, MaxxViT",
    "timm.models.maxxvit.Attention2d": "CoAtNet",
    "timm.models.convit.MHSA": "ConViT",
    "timm.models.convit.GPSA": "ConViT (gated positional attention; mixed after gating)",
    "timm.models.gcvit.WindowAttentionGlobal": "GC ViT",
    "timm.models.fastvit.Attention": "FastViT with attention, MobileCLIP image towers",
    "timm.models.gemma4_vit.Gemma4Attention": "Gemma 4 vision tower",
    "timm.models.metaformer.Attention": "CAFormer",
    "timm.models.nextvit.EfficientAttention": "Next-ViT",
    "timm.models.pvt_v2.Attention": "PVT v2",
    "timm.models.tnt.Attention": "TNT",
    "timm.layers.attention2d.MultiQueryAttention2d": "MobileNet v4 hybrid (one key and value head for all)",
    "timm.layers.attention2d.Attention2d": "EfficientNet-style models with attention blocks",
    "timm.models.twins.GlobalSubSampleAttn": "Twins-PCPVT",
    "timm.models.visformer.Attention": "Visformer",
}

NO_ATTN_DROP = "its maps do not pass through an attn_drop after the softmax"
ODD_LAYOUT = "its maps are not laid out as (batch, heads, queries, keys)"
CHANNELS = "channel attention: its maps weigh channels, not tokens; left out by default"
ANOTHER = "refused with the model's outlook attention: half of a model is not mixed silently"

# class -> (families, reason). One of these refuses the whole model.
REFUSED = {
    "timm.models.xcit.XCA": ("XCiT", CHANNELS),
    "timm.models.edgenext.CrossCovarianceAttn": ("EdgeNeXt", CHANNELS),
    "timm.models.davit.ChannelAttention": ("DaViT", CHANNELS),
    "timm.models.davit.ChannelAttentionV2": ("DaViT v2", CHANNELS),
    "timm.models.davit.WindowAttention": ("DaViT", NO_ATTN_DROP),
    "timm.models.coat.FactorAttnConvRelPosEnc": ("CoaT", "factorised attention has no map over pairs of tokens"),
    "timm.models.cpubone.ConvAttention": ("CPUBone", NO_ATTN_DROP),
    "timm.models.efficientformer.Attention": ("EfficientFormer", NO_ATTN_DROP),
    "timm.models.efficientformer_v2.Attention2d": ("EfficientFormer v2", NO_ATTN_DROP),
    "timm.models.efficientformer_v2.Attention2dDownsample": ("EfficientFormer v2", NO_ATTN_DROP),
    "timm.models.efficientvit_msra.CascadedGroupAttention": (
        "EfficientViT (MSRA)",
        "heads are computed one after the other, each from the last one's output",
    ),
    "timm.models.hiera.MaskUnitAttention": ("Hiera", NO_ATTN_DROP),
    "timm.models.hieradet_sam2.MultiScaleAttention": ("Hiera of SAM 2", NO_ATTN_DROP),
    "timm.models.iformer.SHMA": ("iFormer", "single-head attention, nothing to mix"),
    "timm.models.shvit.SHSA": ("SHViT", "single-head attention, nothing to mix"),
    "timm.models.levit.Attention": ("LeViT", NO_ATTN_DROP),
    "timm.models.levit.AttentionDownsample": ("LeViT", NO_ATTN_DROP),
    "timm.models.lowformer.ConvAttention": ("LowFormer", NO_ATTN_DROP),
    "timm.models.mvitv2.MultiScaleAttention": ("MViT v2", NO_ATTN_DROP),
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": ("MViT v2", NO_ATTN_DROP),
    "timm.models.nest.Attention": ("NesT", f"{ODD_LAYOUT} but per image block"),
    "timm.models.tiny_vit.Attention": ("TinyViT", NO_ATTN_DROP),
    "timm.models.twins.LocallyGroupedAttn": ("Twins-SVT", f"{ODD_LAYOUT} but per window"),
    "timm.models.vision_transformer.DiffParallelScalingBlock": (
        "ViT with differential attention",
        "pairs of maps are subtracted after attn_drop, so one head is not one map",
    ),
    "timm.layers.diff_attention.DiffAttention": (
        "ViT with differential attention",
        "pairs of maps are subtracted after attn_drop, so one head is not one map",
    ),
    "timm.models.vision_transformer_sam.Attention": ("SAM", f"{ODD_LAYOUT} but with batch and heads in one dimension"),
    "timm.models.volo.OutlookAttention": ("VOLO", f"{ODD_LAYOUT} but per window of outlook attention"),
    "timm.models.volo.Attention": ("VOLO", ANOTHER),
    "timm.models.volo.ClassAttention": ("VOLO", ANOTHER),
    "timm.layers.attention2d.MultiQueryAttentionV2": ("no model of timm", f"{ODD_LAYOUT} but with heads third"),
    "timm.layers.bottleneck_attn.BottleneckAttn": ("BoTNet", NO_ATTN_DROP),
    "timm.layers.halo_attn.HaloAttn": ("HaloNet", NO_ATTN_DROP),
    "torch.nn.modules.activation.MultiheadAttention": ("models with torch.nn.MultiheadAttention", NO_ATTN_DROP),
}

# class -> what it is. Passed over with everything inside it: not the model's attention between tokens by heads.
PASSED_OVER = {
    "timm.layers.attention_pool.AttentionPoolLatent": "attention pooling before the head (SigLIP)",
    "timm.layers.attention_pool.AttentionPoolPrr": "attention pooling before the head",
    "timm.layers.attention_pool2d.AttentionPool2d": "attention pooling before the head (CLIP ResNets)",
    "timm.layers.attention_pool2d.RotAttentionPool2d": "attention pooling before the head",
    "timm.layers.other_pool.SimPool1d": "attention pooling before the head",
    "timm.layers.other_pool.SimPool2d": "attention pooling before the head",
    "timm.layers.ml_decoder.TransformerDecoderLayerOptimal": "ML-Decoder head",
    "timm.layers.global_context.GlobalContext": "one context vector for all positions",
    "timm.layers.non_local_attn.NonLocalAttn": "non-local block of a convolutional network, one head",
    "timm.layers.selective_kernel.SelectiveKernelAttn": "choice between convolution kernels",
    "timm.layers.split_attn.RadixSoftmax": "choice between splits of channels",
    "timm.layers.lambda_layer.LambdaLayer": "lambda layer: a softmax over keys alone",
    "timm.models.mobilevit.LinearSelfAttention": "linear attention of MobileViT v2: a softmax over keys alone",
    "timm.models.csatv2.SpatialTransformerBlock": "spatial weighting of CSATv2, one head with one channel",
    "timm.models.efficientvim.HSMSSD": "a state-space layer",
    "timm.models.efficientvim.EfficientViM": "weighted sum of stage outputs (the model itself; its layers are HSMSSD)",
    "timm.models.efficientvim.EfficientViMDistilled": "the same",
}


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], str | None]:
    """The attention layers of a timm model whose maps can be mixed, in the order of its modules, or why there are none.

    All or nothing: one attention layer that cannot be mixed refuses the model, but pooling attention is passed over.
    """
    sites: list[AttentionSite] = []
    problems: dict[str, str] = {}  # class -> reason
    passed: dict[str, str] = {}  # module name -> what it is
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in passed):
            continue
        cls = type(module)
        key = _key(cls)
        if key in SUPPORTED:
            heads = cast(int, module.num_heads)
            route = BOTH_ROUTES if timm_fused.offer(module) else ROUTE
            sites.append(AttentionSite(name, module, heads, route, partial(_install, name, module)))
        elif key in REFUSED:
            problems.setdefault(key, f"{name} ({cls.__name__}, {REFUSED[key][0]}): {REFUSED[key][1]}")
        elif key in PASSED_OVER:
            if name:
                passed[name] = PASSED_OVER[key]
        elif _unknown_attention(cast(Hashable, cls)):
            problems.setdefault(key, f"{name or 'the model'} ({key}): a softmax that coeft's table of classes lacks")
    if problems:
        reasons = list(problems.values())
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return [], f"coeff cannot mix the attention of {type(model).__name__}: {'; '.join(reasons[:3])}{more}"
    if not sites:
        rest = "".join(f"; {name} is {what}" for name, what in list(passed.items())[:1])
        return [], f"{type(model).__name__} has no attention layers between tokens for coeff to mix{rest}"
    return sites, None


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _unknown_attention(cls: Hashable) -> bool:
    """Whether a class that is in no table computes a softmax, or derives from one in the tables."""
    for base in inspect.getmro(cast(type, cls)):
        key = _key(base)
        if key in SUPPORTED or key in REFUSED:
            return True
        if key in PASSED_OVER or base is object or base.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # no source, such as a class typed into a session
            continue
        if re.search(r"\b(softmax|Softmax|scaled_dot_product_attention)\(", source):
            return True
    return False


def _install(name: str, module: nn.Module, mixer: nn.Module) -> None:
    """Put a mixer into an attention module of timm.

    Raises:
        UserError: it has one.
    """
    mixer = cast(CoeffMixer, mixer)
    if hasattr(module, "coeff_mix"):
        raise UserError(f"{name} has a coeff mixer already: attach a stack to a fresh model")
    if mixer.num_heads != module.num_heads:
        raise ValueError(f"{name} has {module.num_heads} heads, the mixer {mixer.num_heads}")
    fused = timm_fused.offer(module)
    module.add_module("coeff_mix", mixer)
    if hasattr(module, "fused_attn"):
        mixer.had_fused_attn = bool(module.fused_attn)
        vars(module)["fused_attn"] = False
    cast(nn.Module, module.attn_drop).register_forward_hook(mixer.on_maps)
    if fused:
        timm_fused.install(module)
    module.register_forward_pre_hook(mixer.on_start)
    module.register_forward_hook(mixer.on_end)


def remove_mixers(model: nn.Module) -> None:
    """Take every mixer out of a timm model: its attention layers run as they did before, with their own forwards."""
    for module in list(model.modules()):
        mixer = module._modules.get("coeff_mix")
        if not isinstance(mixer, CoeffMixer):
            continue
        drop_hooks(module._forward_pre_hooks, mixer.on_start)
        drop_hooks(module._forward_hooks, mixer.on_end)
        drop_hooks(cast(nn.Module, module.attn_drop)._forward_hooks, mixer.on_maps)
        timm_fused.uninstall(module)
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = mixer.had_fused_attn
        del module.coeff_mix

"""Mixers in a model of any library."""

from torch import nn

from coeft.attention.site import AttentionSite


def find_sites(model: nn.Module) -> tuple[list[AttentionSite], str | None]:
    """The attention layers of a transformers or timm model whose maps can be mixed, or why there are none.

    A module that holds a transformers model counts as one; anything else is looked through for classes of timm.
    """
    if _is_hf(model):
        from coeft.attention.hf import find_sites as find_hf

        return find_hf(model)
    from coeft.attention.timm import find_sites as find_timm

    return find_timm(model)


def remove_mixers(model: nn.Module) -> None:
    """Take every mixer out of a model, so that it is what it was before the first one came."""
    if _is_hf(model):
        from coeft.attention.hf import remove_mixers as remove_hf

        return remove_hf(model)
    from coeft.attention.timm import remove_mixers as remove_timm

    return remove_timm(model)


def _is_hf(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in model.modules())

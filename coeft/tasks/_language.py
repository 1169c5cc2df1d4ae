"""What language models are trained and scored by: logits where the loss is, log-likelihoods, means over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coeft.edits import prompting, watched
from coeft.errors import UserError
from coeft.modes import evaluating

if TYPE_CHECKING:
    from coeft.backbones._backbone import Backbone

IGNORED = -100


def predicted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's predictions that count stand, and what they should be.

    labels (B, T) stand where their tokens do, -100 where there is no loss. The prediction of a token is made one place
    before it: bool (B, T), and the K tokens (K,) in the order of rows and places.
    """
    ahead = labels[:, 1:]
    where = F.pad(ahead != IGNORED, (0, 1), value=False)
    return where, ahead[ahead != IGNORED]


def logits_at(backbone: Backbone, inputs: Mapping[str, Tensor], where: Tensor) -> Tensor:
    """Logits of a causal language model at some places alone: where (B, T) bool with K places -> (K, vocabulary).

    The model's own output layer gets only the hidden states of those places, whatever else the model does to its
    logits afterwards (a softcap, a scale), so the logits of prompts and padding never take memory.
    """
    layer = cast(Any, backbone.model).get_output_embeddings()
    calls = 0

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return (args[0][where][None], *args[1:])

    handle = layer.register_forward_pre_hook(choose) if layer is not None else None
    try:
        with prompting(backbone.model, _prompts(backbone.model, inputs, where)):
            logits = backbone.forward(inputs)
    finally:
        if handle is not None:
            handle.remove()
    if not calls:  # a model that multiplies with its embedding by itself
        return logits[where]
    if calls > 1:
        raise RuntimeError(f"{type(backbone.model).__name__} uses its output layer {calls} times in one forward")
    return logits[0]


def _prompts(model: nn.Module, inputs: Mapping[str, Tensor], where: Tensor) -> Tensor:
    """Bool (B, T): the tokens before the first that is predicted, for edits that count them.

    Raises:
        UserError: an edit counts them, and rows hold several texts, or there are no prompts.
    """
    prompt = where.cumsum(1) - where.long() == 0
    if not watched(model):
        return prompt
    if "attention_mask" not in inputs:
        raise UserError(
            "task.packing=true: a method of the stack acts at places of the prompt, and rows hold several; set "
            "task.packing=false, or let it act at all tokens (peft.loreft.positions=all)"
        )
    prompt = prompt & inputs["attention_mask"].bool()
    if not bool((prompt.sum(1) > 1).any()):
        raise UserError(
            "a method of the stack acts at places of the prompt, and no text of a batch has a prompt: every token is "
            "predicted; let it act at all tokens (peft.loreft.positions=all) or give data with prompts"
        )
    return prompt


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats, in float32: logits (K, vocabulary), targets (K,) -> (K,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def log_likelihoods(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood in nats and number of the labelled tokens of each row.

    Args:
        logits: (K, vocabulary), as `logits_at` gives them at `predicted(labels)`.
        labels: (B, T), -100 where there is no token of the text in question.
    Returns:
        float32 (B,) and int64 (B,).
    """
    where, targets = predicted(labels)
    rows = where.nonzero()[:, 0]
    sums = torch.zeros(len(labels), dtype=torch.float32, device=logits.device)
    return sums.index_add(0, rows, -token_losses(logits, targets)), where.sum(1)


@torch.no_grad()
def check_packing(backbone: Backbone) -> None:
    """Try whether a model keeps two texts apart that share a row (see coeft.data._packing.collate_packed).

    In transformers 5.23 the models that do not hand positions to create_causal_mask let packed texts see each other
    and say nothing: OPT, GPT-OSS, Falcon, BLOOM, MPT and others.

    Raises:
        UserError: its logits of the packed texts are not those of the texts by themselves.
    """
    model = backbone.model
    draw = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    texts = [torch.randint(vocabulary, (size,), generator=draw).to(first.device) for size in (7, 5)]
    packed = {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(text), device=first.device) for text in texts])[None],
    }
    with evaluating(model):
        alone = torch.cat([backbone.forward({"input_ids": text[None]})[0] for text in texts]).float()
        together = backbone.forward(packed)[0].float()
    noise = min(0.05, 1000 * torch.finfo(first.dtype).eps)  # far below what another text does
    if not torch.allclose(together, alone, rtol=0.0, atol=noise * float(alone.std())):
        raise UserError(
            f"task.packing=true: {type(model).__name__} lets texts that share a row see each other; "
            f"set task.packing=false"
        )

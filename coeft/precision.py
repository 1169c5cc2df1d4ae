"""The arithmetic of a run: whether matrix products are in bf16, and what is kept in it.

In bf16 the model runs under torch.autocast: matrix products, convolutions and attention take and give bf16 and add up
in float32; norms, softmax statistics and residual sums of a model in float32 stay float32. The weights of frozen layers
are stored in bf16 once, so that no step casts them; what is trained, its gradients, the optimizer's state, the task's
head and the loss are float32. On the CPU attention has the backward pass of coeft/attention/half.py.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coeft.attention.half import fast_attention
from coeft.backbones._backbone import Backbone

ENOUGH = 2_000_000
"""Weights in linear layers from which trainer.precision=auto takes bf16: in smaller models the casts cost much of what
the products save. Nothing was measured between 1.2 M (vit_mini) and 22 M (ViT-S/16), see docs/performance.md."""


def choose(wish: str, model: nn.Module) -> str:
    """fp32 or bf16, from trainer.precision and the model: no timing, so that a machine always chooses the same."""
    if wish != "auto":
        return wish
    return "bf16" if multiplies_bf16() and _linear_weights(model) >= ENOUGH else "fp32"


def multiplies_bf16() -> bool:
    """Whether the device of this process multiplies bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(has.get(f) for f in ("amx_bf16", "avx512_bf16", "bf16"))


def _linear_weights(model: nn.Module) -> int:
    """Entries of the weights of linear layers, each shared one counted once."""
    weights = {id(layer.weight): layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)}
    return sum(weights.values())


def store(backbone: Backbone) -> None:
    """Keep the weights and biases of frozen linear layers and convolutions in bf16, and let the heads run in float32.

    In place, for a model that will run in bf16 and whose stack is attached and filled; twice is once. A weight that
    another kind of module uses too, as tied embeddings, and one that a hook or a parametrisation makes, stays.
    """
    heads = {id(parameter) for parameter in backbone.head_parameters().values()}
    users: dict[int, list[nn.Module]] = {}
    for module in backbone.model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    for module in list(backbone.model.modules()):
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        for parameter in (module._parameters.get("weight"), module._parameters.get("bias")):
            if parameter is None or parameter.requires_grad or parameter.dtype != torch.float32:
                continue
            if id(parameter) in heads:
                continue
            if all(isinstance(user, nn.Linear | nn.Conv1d | nn.Conv2d) for user in users[id(parameter)]):
                parameter.data = parameter.data.to(torch.bfloat16)
    for name in backbone.heads:
        head = backbone.model.get_submodule(name)
        if "forward" not in vars(head):
            vars(head)["forward"] = partial(_exactly, head)


def _exactly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module's class in float32, whatever the model around it computes in."""
    args = tuple(_exact(value) for value in args)
    device = next((value.device for value in args if isinstance(value, Tensor)), torch.device("cpu"))
    with torch.autocast(device.type, enabled=False):
        return type(module).forward(module, *args, **{name: _exact(value) for name, value in kwargs.items()})


def _exact(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a model computes in fp32 or bf16.

    Args:
        precision: what `choose` gave.
        device: of the model.
    """
    with ExitStack() as contexts:
        if precision == "bf16":
            contexts.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                contexts.enter_context(fast_attention())
        yield

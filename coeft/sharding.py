"""Frozen weights divided among the processes of a run: trainer.strategy=fsdp.

What is trained is small and stays whole in every process, so that gradients, clipping, checkpoints and adapters are
those of ddp. The frozen weights of each transformer block, and those outside of the blocks, are one unit of torch's
fully_shard: every process keeps a share of each weight (rows of its first dimension), and the units are gathered one
after the other in the forward, and again in the backward pass.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from coeft import ranks
from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone
from coeft.data._part import Batch
from coeft.errors import UserError
from coeft.modes import evaluating

if TYPE_CHECKING:
    from coeft.module import TuningModule

WHERE = "trainer.strategy=fsdp"


class Unit(NamedTuple):
    """Weights that are gathered together, while their module runs."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    """Name in the model -> frozen weight."""


def units(backbone: Backbone, stack: Stack, processes: int) -> list[Unit]:
    """The frozen weights to be divided: those of each block, inner blocks first, last those outside of all blocks.

    Left whole are weights that several units hold, weights with fewer rows than there are processes, and what methods
    have brought with them.

    Raises:
        UserError: there is nothing to divide, or no blocks to divide it by, weights are quantised, or processes would
            not go through the same blocks.
    """
    model = backbone.model
    if dropping := [name for name, module in model.named_modules() if _drops_blocks(module)]:
        raise UserError(
            f"{WHERE} needs every process to go through the same blocks, and {dropping[0] or backbone.name} leaves "
            "some out at random in training (layerdrop); set that to 0 in backbone.options, or take ddp"
        )
    if not backbone.blocks:
        raise UserError(
            f"{WHERE} divides the frozen weights by transformer blocks, of which {backbone.name} has none; take ddp"
        )
    modules: dict[str, nn.Module] = {"": model} | {name: model.get_submodule(name) for name in backbone.blocks}
    holders: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[parameter].add(modules[_holder(name, modules)])
        names.setdefault(parameter, name)
    found: dict[nn.Module, dict[str, nn.Parameter]] = {
        modules[name]: {} for name in sorted(modules, key=lambda name: -len(name))
    }
    for parameter, name in names.items():
        if parameter.requires_grad or name not in stack.pretrained:
            continue
        if not parameter.is_floating_point():
            raise UserError(
                f"{WHERE} divides no quantised weights ({name}); leave backbone.quantization out, or take ddp"
            )
        if len(holders[parameter]) == 1 and parameter.dim() and len(parameter) >= processes:
            found[next(iter(holders[parameter]))][name] = parameter
    if not any(found.values()):
        raise UserError(f"{WHERE} divides frozen weights, and [{', '.join(stack.methods)}] freezes none; take ddp")
    return [Unit(module, parameters) for module, parameters in found.items()]


def _drops_blocks(module: nn.Module) -> bool:
    """As modules of transformers do."""
    share = getattr(module, "layerdrop", 0.0)
    return isinstance(share, int | float) and share > 0


def _holder(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The innermost of these modules that has the parameter."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return ""


def resident(backbone: Backbone, stack: Stack, processes: int) -> int:
    """Bytes of a model's parameters that a process holds at most during a step: its share, what stays whole, what is
    outside of the blocks, and two blocks, of which one is gathered ahead of time."""
    every = {parameter: parameter.numel() * parameter.element_size() for parameter in backbone.model.parameters()}
    found = units(backbone, stack, processes)
    sizes = [sum(every[parameter] for parameter in unit.parameters.values()) for unit in found]
    *blocks, outside = sizes
    divided = sum(sizes)
    return sum(every.values()) - divided + divided // processes + outside + sum(sorted(blocks)[-2:])


def shard(module: "TuningModule") -> None:
    """Divide the frozen weights of a model whose stack is attached and calibrated; every process has to call it.

    Raises:
        UserError: as `units`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone, stack, processes = module.backbone, module.stack, ranks.place().world
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (processes,))
    found = units(backbone, stack, processes)
    divided = {parameter for unit in found for parameter in unit.parameters.values()}
    whole = set(backbone.model.parameters()) - divided
    for unit in found:
        for parameter in unit.parameters.values():
            parameter.data = parameter.data.contiguous()
        unit.module.register_forward_hook(_own_outputs)
        fully_shard(unit.module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    module.to(device)  # what stays whole, as the shares are there already
    # ddp would send the shares of the first process to all others
    names = [f"model.{name}" for unit in found for name in unit.parameters]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _own_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: outputs that are views become copies.

    A change of a view in place, by the model that gets it, would lose torch's hook on it, which gathers the weights
    again for the backward pass.
    """
    if not torch.is_grad_enabled():
        return output
    return tree_map_only(Tensor, lambda tensor: tensor if tensor._base is None else tensor.clone(), output)


def check_forward(module: "TuningModule", batch: Batch) -> None:
    """Send some samples through the model that `shard` has divided; every process has to call it with the same ones.

    Raises:
        UserError: the model reads frozen weights where they are not gathered.
    """
    device = next(module.parameters()).device
    try:
        with evaluating(module), torch.no_grad():
            module({name: value.to(device) for name, value in batch.items()})
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{WHERE} cannot divide {module.backbone.name}: it reads weights of its blocks outside of them ({reason}); "
            "take ddp"
        ) from error

"""peft's own layers in the chain of a stack.

A tuner of peft is injected into a tree that holds the target layers alone, so that it neither freezes nor renames
anything of the model. Each of its layers then becomes an Update of the model's layer; its `base_layer` is a stand-in
that gives what the methods before it made. peft's own functions read and write the state, and merge.
"""

import copy
import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from coeft.adapt import Attachment, copy_into
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.methods._hf_options import CIRCUMSTANCES, configure, first_line
from coeft.methods._lora import bias_was_joined, stock_targets
from coeft.methods._weights import attachment
from coeft.modes import evaluating
from coeft.targets import weight_targets
from coeft.weights import Stage, Update, adapt_layer, autocasts, update_dtype

if TYPE_CHECKING:
    from coeft.methods.hf import HF

ADAPTER = "default"  # peft's name of the one adapter in a tree


class _Inputs:
    """What a stand-in gives: the layer so far, as a function and as a weight."""

    def __init__(
        self, outputs: Callable[[Tensor], Tensor], weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> None:
        self.outputs, self.weight, self.bias = outputs, weight, bias


class _Live(Tensor):
    """A weight that methods before made: `.data`, by which peft's layers read weights, keeps the gradient."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self


class Before(nn.Linear):
    """Stands for the layer under a layer of peft: the model's layer as the methods before left it, with its bias.

    It owns no parameters. Outside of a forward it shows the pretrained layer.
    """

    layer: nn.Linear
    now: _Inputs | None

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = layer.weight.shape
        # past nn.Module, so that the layer has no second name in the model
        self.__dict__.update(layer=layer, now=None)

    @property
    def pretrained(self) -> Tensor:
        """The layer's own weight, asked for each time: trainer.strategy=fsdp puts shares in its place."""
        return self.layer.weight

    @property
    def own_bias(self) -> Tensor | None:
        """The layer's own bias."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        assert self.now is not None, "a layer of peft was called outside of its chain"
        return self.now.outputs(input)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.now.weight() if self.now is not None else self.pretrained

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.now.bias() if self.now is not None else self.own_bias

    @contextmanager
    def being(self, now: _Inputs) -> Iterator[None]:
        """Stand for this while inside."""
        before, self.now = self.now, now
        try:
            yield
        finally:
            self.now = before


class PeftUpdate(Update):
    """A layer of peft as one update of a chain.

    peft's layers act on outputs with the bias, some also on the bias, so that the layer gets the bias and it is taken
    off again; `shift` gives the new bias for a merge.
    """

    def __init__(self, layer: nn.Module, base: nn.Linear) -> None:
        """
        Args:
            layer: of peft.
            base: of the model, which it acts on.
        """
        super().__init__()
        self.layer = layer
        del layer._modules["base_layer"]
        layer.__dict__["base_layer"] = Before(base)
        self.dtype = update_dtype(base.weight)
        self.off = False
        """Whether the update is left out, to see what the model gives without it."""

    @property
    def stand_in(self) -> Before:
        """What stands for the layer under peft's."""
        return cast(Before, self.layer.base_layer)

    def forward(self, input: Tensor, before: Stage) -> Tensor:
        if self.off or not input.numel():
            return before(input)
        bias = before.layer.bias
        x = input if autocasts(input) else input.to(self.dtype)
        if input.dim() > 3:  # some layers of peft know (batch, tokens, features) alone
            x = x.flatten(1, -2)

        def outputs(given: Tensor) -> Tensor:
            output = before(given)
            if not autocasts(given):
                output = output.to(given.dtype)
            if bias is not None:
                return output + bias.to(output.dtype)
            return output.clone() if before.before is not None else output  # peft adds to it in place

        now = _Inputs(outputs, lambda: _weight(before, self.dtype), lambda: _bias(before, self.dtype))
        with self.stand_in.being(now):
            result = cast(Tensor, self.layer(x))
        if bias is not None:
            result = result - bias.to(result.dtype)
        return result.unflatten(1, input.shape[1:-1]) if input.dim() > 3 else result

    def weight(self, before: Tensor) -> Tensor:
        """The new weight. Without gradients it is peft's own merge; else what peft's forward makes of each input."""
        if not self.mergeable:
            raise UserError(f"{type(self.layer).__name__} of peft gives no weight: put it last in the stack")
        return self._forwarded(before) if torch.is_grad_enabled() else self.merged(before)

    def merged(self, before: Tensor) -> Tensor:
        """The weight (out, in) that peft's merge makes of another; NotImplementedError if peft has none."""
        plain = nn.Linear(before.shape[1], before.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(before.detach().clone(), requires_grad=False)
        bias = self.stand_in.own_bias
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(before.dtype, copy=True), requires_grad=False)
        layer = copy.copy(self.layer)  # shares the parameters; what merge notes of itself stays in the copy
        vars(layer).update(base_layer=plain, merged_adapters=[])
        cast(BaseTunerLayer, layer).merge()
        return plain.weight.detach()

    def shift(self, bias: Tensor | None) -> Tensor | None:
        """The new bias (out,) from the one before it.

        Raises:
            UserError: the method has a bias of its own for a layer without one.
        """
        weight = self.stand_in.pretrained
        given = None if bias is None else bias.to(self.dtype)
        zeros = torch.zeros(1, 1, weight.shape[1], dtype=self.dtype, device=weight.device)
        with evaluating(self.layer):
            result = self._applied(zeros, weight.detach().to(self.dtype), given)[0, 0]
        if bias is not None:
            return result
        if result.any():
            raise UserError(f"{type(self.layer).__name__} of peft has a bias that a layer without one cannot hold")
        return None

    def _forwarded(self, before: Tensor) -> Tensor:
        rows = torch.eye(before.shape[1], dtype=before.dtype, device=before.device)
        none = rows.new_zeros(1, len(rows))
        with evaluating(self.layer):
            outputs = self._applied(torch.cat([rows, none])[None], before, None)[0]
        return (outputs[:-1] - outputs[-1:]).T

    def _applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """peft's layer on inputs (..., in) over a given weight and bias."""
        now = _Inputs(lambda given: F.linear(given, weight, bias), lambda: weight.as_subclass(_Live), lambda: bias)
        with self.stand_in.being(now):
            return cast(Tensor, self.layer(x))


def _weight(before: Stage, dtype: torch.dtype) -> Tensor:
    """The weight of a stage as a layer of peft may read it."""
    if before.before is None:
        return cast(Tensor, before.layer.weight).to(dtype)
    return before.weight().to(dtype).as_subclass(_Live)


def _bias(before: Stage, dtype: torch.dtype) -> Tensor | None:
    """The bias of a stage as a layer of peft may read it."""
    bias = before.bias()
    if bias is None or before.before is None:
        return bias if bias is None else bias.to(dtype)
    return bias.to(dtype).as_subclass(_Live)


def attach(settings: "HF", backbone: Backbone) -> Attachment:
    """See HF.attach."""
    config = configure(settings)
    where = f"peft.{settings.name}"
    names = weight_targets(settings, backbone)
    layers = {name: adapt_layer(backbone.model, name) for name in names}
    if strange := [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]:
        raise UserError(f"{where}: {strange[0]} is a convolution; through peft coeft adapts linear layers")
    config.target_modules = _as_peft_keeps(stock_targets(names, backbone.model))
    stored = _stored(config, names, backbone)
    tuner = _inject(config, {name: cast(nn.Linear, layer) for name, layer in layers.items()}, where)
    updates: dict[str, Update] = {}
    for name, layer in layers.items():
        updates[name] = PeftUpdate(tuner.model.get_submodule(name), cast(nn.Linear, layer))
        layer.add(settings.name, updates[name])
    kinds = {layer.bias is None: cast(PeftUpdate, updates[name]) for name, layer in layers.items()}
    mergeable = all(map(_merges, kinds.values()))
    for update in updates.values():  # one that stays in some layers stays in all: it is stored as a whole
        update.mergeable = mergeable
    tree = _Tree()
    tree.base_model = tuner
    tree.peft_config = tuner.peft_config  # type: ignore[assignment]

    def pack() -> tuple[dict[str, Any], dict[str, Tensor]]:
        return stored, {key: value.detach().cpu().clone() for key, value in _state(tree).items()}

    def unpack(found: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        _check_same(stored, found, where)
        copy_into({key: torch.empty_like(value) for key, value in _state(tree).items()}, tensors, where)
        set_peft_model_state_dict(tree, tensors, ADAPTER)
        assert all(torch.equal(value.cpu(), tensors[key].to(value.dtype)) for key, value in _state(tree).items())

    @contextmanager
    def without() -> Iterator[None]:
        for update in updates.values():
            cast(PeftUpdate, update).off = True
        try:
            yield
        finally:
            for update in updates.values():
                cast(PeftUpdate, update).off = False

    found = attachment(settings, backbone, updates, lambda update: f"{stored['peft_type']} of peft", pack, unpack)
    found.without = without
    return found


class _Tree(nn.Module):
    """A place in a tree of modules."""


def _inject(config: PeftConfig, layers: Mapping[str, nn.Linear], where: str) -> BaseTuner:
    """peft's tuner in a tree of layers that have the weights and the names of the model's.

    Raises:
        UserError: peft refuses a layer, leaves one out, or changes a pretrained weight.
    """
    tree, leaves = _Tree(), dict[str, nn.Linear]()
    for name, layer in layers.items():
        leaf = leaves[name] = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        leaf.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        if layer.bias is not None:
            leaf.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        *parents, last = name.split(".")
        node: nn.Module = tree
        for part in parents:
            if part not in node._modules:
                node.add_module(part, _Tree())
            node = cast(nn.Module, node._modules[part])
        node.add_module(last, leaf)
    before = {name: _digest(leaf) for name, leaf in leaves.items()}
    kind = cast(PeftType, config.peft_type)
    try:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind](tree, config, ADAPTER)
        tuner._cast_adapter_dtype(ADAPTER, True)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, IndexError) as error:
        raise UserError(f"{where}: peft refuses: {first_line(error)}") from error
    for name, leaf in leaves.items():
        wrapped = tree.get_submodule(name)
        if not isinstance(wrapped, BaseTunerLayer) or wrapped.base_layer is not leaf:
            raise UserError(f"{where}: {kind.value} of peft does not wrap the linear layer {name}")
        if _digest(leaf) != before[name]:
            raise UserError(
                f"{where}: with these options {kind.value} of peft changes the pretrained weights at its "
                "start, which the rest of a stack relies on; take options that do not"
            )
    return tuner


def _digest(layer: nn.Linear) -> tuple[float, ...]:
    """Numbers that change when the values of a layer do."""
    values = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return tuple(
        float(total) for v in values for total in (v.sum(dtype=torch.float64), v.abs().sum(dtype=torch.float64))
    )


def _merges(update: PeftUpdate) -> bool:
    """Whether peft can merge a layer like this one; some types cannot at all, some need a bias."""
    try:
        update.merged(update.stand_in.pretrained.detach().to(update.dtype))
    except (NotImplementedError, ValueError):
        return False
    return True


def _as_peft_keeps(targets: list[str] | str) -> set[str] | str:
    return targets if isinstance(targets, str) else set(targets)


def _stored(config: PeftConfig, names: list[str], backbone: Backbone) -> dict[str, Any]:
    """adapter_config.json of a configuration, as peft writes it, for the model's own names."""
    model = backbone.model
    values = {key: _plain(value) for key, value in config.to_dict().items() if not callable(value)}
    values |= {
        "peft_type": str(cast(PeftType, config.peft_type).value),
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": backbone.name,
        "inference_mode": True,
        "target_modules": stock_targets(names, model),
    }
    if any(bias_was_joined(model, name) for name in names):
        values["set_qkv_bias_separate_of_the_attention_to_true"] = True  # see the same in LoRA's
    values.pop("runtime_config", None)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(map(_plain, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _state(tree: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter, named as peft stores them."""
    return cast(dict[str, Tensor], get_peft_model_state_dict(tree, adapter_name=ADAPTER, save_embedding_layers=False))


def _check_same(own: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """The configuration of an adapter must be that of the stack."""
    if found.get("peft_type") != own["peft_type"]:
        raise UserError(f"{where}: the adapter is of peft_type {found.get('peft_type')!r}, not {own['peft_type']}")
    for key, value in own.items():
        if key not in CIRCUMSTANCES and key in found and found[key] != value:
            raise UserError(f"{where}: the adapter has {key} {found[key]!r}, not {value!r}; set {where}.options.{key}")

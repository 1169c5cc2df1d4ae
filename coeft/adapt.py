"""The stack: PEFT methods on one frozen model, in order; and the linear layer that carries their updates.

Nothing here knows a config, a file or a training loop. What is trained is decided by requires_grad and by ownership
(every trainable parameter belongs to exactly one method or to the head), never by a parameter's name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from coeft.backbones._backbone import Backbone
from coeft.errors import UserError, near
from coeft.seeding import reseed

PREFIX = "base_model.model."  # peft's prefix of every tensor in adapter_model.safetensors


@dataclass(frozen=True)
class Place:
    """One place a method attached to, as dry_run shows it."""

    name: str
    """Full module or parameter name."""
    route: str
    """How it acts there, such as "maps (attn_drop)", "rank 8" or "rank 8 on q, v"."""
    num_parameters: int


@dataclass(kw_only=True)
class Attachment:
    """What one method did to a model."""

    method: str
    places: list[Place]
    parameters: dict[str, nn.Parameter]
    """Name in model.named_parameters() -> parameter that this method trains."""
    probes: dict[str, nn.Module] = field(default_factory=dict)
    """Place -> module that every forward of the model must call; else the method is silently inactive."""
    pack: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    """The portable form: (adapter_config.json, tensors of adapter_model.safetensors), keys as in stock peft."""
    unpack: Callable[[dict[str, Any], dict[str, Tensor]], None]
    """Fill the parameters from that form. Raises UserError naming what is missing, unexpected or of another shape."""
    merges: bool = False
    """After merge() the weights alone hold this method; False: it stays active in the merged model, as coeff does."""


class Row(NamedTuple):
    """One line of dry_run's table of what the stack attached to."""

    method: str
    place: str
    route: str
    parameters: int


class ParameterCount(NamedTuple):
    """Numbers of parameters, each shared one counted once; trainable = adapter + head."""

    trainable: int
    adapter: int
    head: int
    total: int


class Stack:
    """PEFT methods on one model, in the order of application. An empty stack trains the head alone.

    Args:
        methods: method name -> its settings, which have `kind` (the name) and `attach(backbone) -> Attachment`.

    Raises:
        UserError: full is combined with another method.
    """

    def __init__(self, methods: Mapping[str, Any]) -> None:
        self.methods = dict(methods)
        self.attachments: list[Attachment] = []
        """What the methods did to the model of the last attach(), in order."""
        for name, settings in self.methods.items():
            if settings.kind != name:
                raise UserError(f"peft.{name} is of kind {settings.kind}: a stack holds each kind once, under its name")
        if "full" in self.methods and len(self.methods) > 1:
            others = ", ".join(name for name in self.methods if name != "full")
            raise UserError(
                f"peft: full trains every weight already, so that {others} would train the same functions twice; "
                f"take full alone, or {others} without full"
            )

    def attach(self, backbone: Backbone, seed: int) -> None:
        """Freeze the model, unfreeze its head, and attach every method in order, each drawn from its own seed.

        Batch norms whose scale stays frozen keep their statistics in training too: a frozen model must not drift.

        Raises:
            UserError: a method does not fit the model, attaches to nothing, or trains what another one trains.
        """
        self.attachments = []
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(False)
        for parameter in backbone.head_parameters().values():
            parameter.requires_grad_(True)
        for name, settings in self.methods.items():
            reseed(seed, "adapter", name)
            attachment = settings.attach(backbone)
            if not attachment.places:
                raise UserError(f"peft.{name} attaches to nothing in {backbone.name}")
            self.attachments.append(attachment)
        _check_owners(backbone, self.parameters())
        for module in backbone.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.weight is None or not module.weight.requires_grad:
                    module.register_forward_pre_hook(_keep_statistics)

    def probe(self, backbone: Backbone, inputs: Tensor | Mapping[str, Any]) -> Any:
        """The model's output for a batch, in eval mode, when every method was called.

        Args:
            inputs: images (B, C, H, W), normalised, or a prepared batch, see Backbone.forward.

        Leaves no trace: no gradients, hooks removed, training modes restored.

        Raises:
            UserError: a module that a method acts through was not called, so that the method would train nothing.
        """
        probes = [(a.method, place, module) for a in self.attachments for place, module in a.probes.items()]
        model = backbone.model

        def run() -> Any:
            return backbone.forward(inputs) if isinstance(inputs, Mapping) else model(inputs)

        return check_called(model, probes, run, backbone.name)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Method -> name in model.named_parameters() -> parameter that it trains."""
        return {attachment.method: dict(attachment.parameters) for attachment in self.attachments}

    def report(self) -> list[Row]:
        """What every method attached to, and by which route."""
        return [Row(a.method, p.name, p.route, p.num_parameters) for a in self.attachments for p in a.places]


def check_called(
    model: nn.Module, probes: Sequence[tuple[str, str, nn.Module]], run: Callable[[], Any], name: str
) -> Any:
    """What a forward of the model gives, in eval mode, when every one of the modules was called; see Stack.probe.

    Args:
        probes: (method, place, module that it acts through).
        run: calls the model.
        name: of the model, for the message.
    """
    called: set[int] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        called.add(id(module))

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(note) for _, _, module in probes]
    try:
        model.eval()
        # not inference_mode: tensors that a model caches in this forward must serve in training later
        with torch.no_grad():
            output = run()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    silent: dict[str, list[str]] = {}
    for method, place, module in probes:
        if id(module) not in called:
            silent.setdefault(method, []).append(place)
    if silent:
        found = [f"peft.{method} is never called at {_listed(places)}" for method, places in silent.items()]
        raise UserError(f"{name} bypasses modules that a method acts through: {'; '.join(found)}")
    return output


def count_parameters(backbone: Backbone, stack: Stack) -> ParameterCount:
    """Parameters of the model with its attached stack."""
    parameters = list(backbone.model.parameters())
    count = ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        adapter=sum(p.numel() for owned in stack.parameters().values() for p in owned.values()),
        head=sum(p.numel() for p in backbone.head_parameters().values() if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )
    assert count.trainable == count.adapter + count.head, f"trainable parameters without an owner: {count}"
    return count


def merge(backbone: Backbone, stack: Stack) -> list[str]:
    """Fold every update of a linear layer into its weight, in place; twice is once.

    Afterwards those layers have their original types and state-dict keys again. Returns the methods that cannot be
    folded and are still active; `stack` then holds these alone.
    """
    for module in list(backbone.model.modules()):
        if isinstance(module, AdaptedLinear):
            _replace(backbone.model, module, module.merged())
    stack.attachments = [attachment for attachment in stack.attachments if not attachment.merges]
    return [attachment.method for attachment in stack.attachments]


def _check_owners(backbone: Backbone, owned: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    """Every trainable parameter belongs to exactly one method or the head, under its name in the model."""
    named = dict(backbone.model.named_parameters())
    owners: dict[int, str] = {id(parameter): "the head" for parameter in backbone.head_parameters().values()}
    for method, parameters in owned.items():
        for name, parameter in parameters.items():
            assert named.get(name) is parameter, f"{method}: {name} is not a parameter of the model"
            assert parameter.requires_grad, f"{method}: {name} is frozen"
            if id(parameter) in owners:
                raise UserError(f"peft: {owners[id(parameter)]} and {method} both train {name}; take one of them")
            owners[id(parameter)] = method
    stray = [name for name, parameter in named.items() if parameter.requires_grad and id(parameter) not in owners]
    assert not stray, f"trainable, but of no method and not of the head: {_listed(stray)}"


def _keep_statistics(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: normalise with the running statistics and do not update them. A hook survives deepcopy."""
    module.training = False


class Update(nn.Module):
    """What one method adds to a linear layer: forward maps inputs (..., in) to an addition to the outputs (..., out).

    Its parameters are float32 over a base weight of lower precision, else of the base weight's type.
    """

    mergeable = True
    """Whether delta() is the whole effect in eval mode."""

    def delta(self) -> Tensor:
        """The update in the shape of the weight, (out, in), in float32 or float64."""
        raise NotImplementedError


def update_dtype(weight: Tensor) -> torch.dtype:
    """The type in which updates of a weight are kept and trained: never below float32."""
    return torch.promote_types(weight.dtype, torch.float32)


class AdaptedLinear(nn.Linear):
    """A linear layer with updates: y = x W^T + b + sum of updates(x), in the order of the stack.

    Takes over the parameters of `base` themselves, its hooks, training flag and every other attribute, without a
    copy, so that the base model's state-dict keys stay; `base` is not to be used any more.

    Under autocast everything runs in the autocast type. Without it updates run in their parameters' type and the sum
    is rounded once to the type of the base layer's output.
    """

    updates: nn.ModuleDict
    """Method name -> Update."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(base))
        self._parameters, self._modules = dict(base._parameters), dict(base._modules)
        self.base_type: type[nn.Linear] = type(base)
        self.parent_bias_separate: bool | None = None
        """What qkv_bias_separate of the parent was before adapt_linear set it; None where the parent has none."""
        self.updates = nn.ModuleDict()

    def add(self, method: str, update: Update) -> None:
        """Put the update of a method last.

        Raises:
            UserError: the method has one here already.
        """
        if method in self.updates:
            raise UserError(f"peft.{method} is attached to this layer already: attach a stack to a fresh model")
        self.updates[method] = update.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        base = super().forward(input)
        output = base
        for update in self.updates.values():
            output = output + update(input)
        return output.to(base.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new layer of the original type with every mergeable update folded in; self is left as it is.

        The sum is formed in float32 or float64 and rounded once. Updates that do not merge stay: the new layer is
        then an AdaptedLinear that holds them. Hooks and remaining updates are shared with self, not copied.
        """
        updates = cast(dict[str, Update], dict(self.updates.items()))
        stay = {name: update for name, update in updates.items() if not update.mergeable}
        weight = self.weight.to(update_dtype(self.weight))
        for update in updates.values():
            if update.mergeable:
                weight = weight + update.delta().to(weight)
        plain: nn.Linear = self.base_type.__new__(self.base_type)
        own = ("base_type", "parent_bias_separate")
        plain.__dict__.update({key: value for key, value in vars(self).items() if key not in own})
        plain._modules = {name: module for name, module in self._modules.items() if name != "updates"}
        plain._parameters = dict(self._parameters)
        plain.weight = nn.Parameter(weight.to(self.weight.dtype, copy=True), requires_grad=self.weight.requires_grad)
        if not stay:
            return plain
        rest = AdaptedLinear(plain)
        rest.parent_bias_separate = self.parent_bias_separate
        rest.updates.update(stay)
        return rest


# Subclasses whose forward is that of nn.Linear (timm's casts while scripting only).
LINEAR_TYPES = ("torch.nn.modules.linear.Linear", "timm.layers.linear.Linear")


def adapt_linear(model: nn.Module, name: str) -> AdaptedLinear:
    """The layer `name` of the model as an AdaptedLinear, put in its place, everywhere it is used, if it is not one.

    Attention modules of timm that read the weight of their child qkv past its forward (BEiT, EVA, SwinV2, while
    `qkv_bias_separate` is False) are switched to call it; the result is the same to round-off.

    Raises:
        UserError: there is no such layer, or one whose forward is not known to be that of nn.Linear.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"there is no layer {name}; {near(name, (n for n, _ in model.named_modules() if n))}") from None
    if isinstance(module, AdaptedLinear):
        return module
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module, nn.Linear) or kind not in LINEAR_TYPES or "forward" in vars(module):
        patched = " with a replaced forward" if "forward" in vars(module) else ""
        raise UserError(f"{name} is a {kind}{patched}; coeft can adapt {' and '.join(LINEAR_TYPES)} only")
    if module.weight.is_meta:
        raise UserError(f"{name} has no weights yet (meta device): load the model before attaching methods")
    adapted = AdaptedLinear(module)
    _replace(model, module, adapted)
    return adapted


def _replace(model: nn.Module, old: nn.Linear, new: nn.Linear) -> None:
    """Put `new` wherever the model has `old`, and set qkv_bias_separate of the parent to match."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is not old:
                continue
            parent._modules[child] = new
            if child != "qkv" or not hasattr(parent, "qkv_bias_separate"):
                continue
            if isinstance(new, AdaptedLinear):
                if new.parent_bias_separate is None:
                    new.parent_bias_separate = bool(parent.qkv_bias_separate)
                vars(parent)["qkv_bias_separate"] = True
            elif isinstance(old, AdaptedLinear) and old.parent_bias_separate is not None:
                vars(parent)["qkv_bias_separate"] = old.parent_bias_separate


def linear_layers(backbone: Backbone) -> dict[str, nn.Linear]:
    """Full name -> linear layer of the base model, in the order of its modules; without the head's."""
    layers: dict[str, nn.Linear] = {}
    hidden = list(backbone.heads)  # and the insides of adapted layers
    for name, module in backbone.model.named_modules():
        if isinstance(module, nn.Linear) and not _inside(name, hidden):
            layers[name] = module
        if isinstance(module, AdaptedLinear):
            hidden.append(name)
    return layers


def in_blocks(names: Sequence[str], backbone: Backbone, layers: Sequence[int | str] | None, where: str) -> list[str]:
    """Those of the names that lie in the chosen blocks; None keeps all, also those outside of any block."""
    if layers is None:
        return list(names)
    blocks = [backbone.blocks[i] for i in select_layers(backbone.blocks, layers, where)]
    return [name for name in names if _inside(name, blocks)]


def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill the targets from tensors of the same names and shapes.

    Raises:
        UserError: names tensors that are missing, unexpected or of another shape; nothing is filled then.
    """
    wrong = [f"{name} is missing" for name in targets if name not in tensors]
    wrong += [f"{name} is unexpected" for name in tensors if name not in targets]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(target.shape)}"
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    ]
    if wrong:
        raise UserError(f"{where}: the adapter does not fit: {_listed(wrong, '; ')}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def select_layers(names: Sequence[str], layers: Sequence[int | str] | None, where: str) -> list[int]:
    """Indices of the chosen names, ascending and each once; None chooses all.

    An int is an index (negative from the end). A string is a regular expression that is searched for in every name,
    so "4" finds blocks.4 and blocks.14 but "blocks\\.4$" only the first. `where` names the option in messages.

    Raises:
        UserError: an index is out of range, or a pattern is no regular expression or matches no name.
    """
    if layers is None:
        return list(range(len(names)))
    chosen: set[int] = set()
    for layer in layers:
        if isinstance(layer, str):
            pattern = matcher(layer, where)
            found = [i for i, name in enumerate(names) if pattern.search(name)]
            if not found:
                raise UserError(f"{where}: {layer!r} matches no layer; {near(layer, names)}")
            chosen.update(found)
        elif isinstance(layer, int) and not isinstance(layer, bool):
            if not -len(names) <= layer < len(names):
                raise UserError(f"{where}: there is no layer {layer}; {_index_range(names)}")
            chosen.add(layer % len(names))
        else:
            raise UserError(f"{where}: {layer!r} is neither an index nor a regular expression")
    return sorted(chosen)


def matcher(pattern: str, where: str) -> re.Pattern[str]:
    """The compiled regular expression; UserError naming the option and what is wrong with it otherwise."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def _index_range(names: Sequence[str]) -> str:
    if not names:
        return "this model has none to choose from"
    last = len(names) - 1
    return f"indices are 0 to {last}, or -{len(names)} to -1 from the end ({names[0]} ... {names[last]})"

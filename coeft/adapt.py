"""The stack: PEFT methods on one frozen model, in order.

What they do to weights is carried by coeft/weights.py, what they do to activations by coeft/edits.py.

Nothing here knows a config, a file or a training loop. What is trained is decided by requires_grad and by ownership
(every trainable parameter belongs to exactly one method or to the head), never by a parameter's name.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coeft.backbones._backbone import Backbone
from coeft.edits import fold_edits
from coeft.errors import UserError
from coeft.modes import evaluating
from coeft.seeding import kept_generators, reseed
from coeft.weights import merge_layers

PREFIX = "base_model.model."  # peft's prefix of every tensor in adapter_model.safetensors


@dataclass(frozen=True)
class Place:
    """One place a method attached to, as dry_run shows it."""

    name: str
    """Full module or parameter name."""
    route: str
    """How it acts there, such as "maps (attn_drop)", "rank 8" or "rank 8 on q, v"."""
    num_parameters: int


Loss = Callable[[Any], Tensor]
"""A batch -> the mean loss of its samples, a scalar that depends on the weights of the model."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a method chooses by samples of the training data before the first step, such as a mask."""

    batches: int
    """How many it wants; there may be fewer."""
    batch_size: int
    parameters: int
    """How many parameters will be trained then, at most."""
    run: Callable[[Iterable[Any], Loss], None]
    """Choose. May turn on gradients of frozen weights, and must turn them off again."""


@dataclass(kw_only=True)
class Attachment:
    """What one method did to a model."""

    method: str
    """Its name in the stack: the key of its settings in `peft`."""
    kind: str = ""
    """The kind of its settings, set by the stack: the same as the name, unless the name is that of a preset."""
    places: list[Place]
    parameters: dict[str, nn.Parameter]
    """Name in model.named_parameters() -> parameter that this method trains."""
    probes: dict[str, nn.Module] = field(default_factory=dict)
    """Place -> module that every forward of the model must call; else the method is silently inactive."""
    pack: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    """The portable form: (adapter_config.json, tensors of adapter_model.safetensors), keys as in stock peft."""
    unpack: Callable[[dict[str, Any], dict[str, Tensor]], None]
    """Fill the parameters from that form. Raises UserError naming what is missing, unexpected or of another shape."""
    without: Callable[[], AbstractContextManager[None]] | None = None
    """A context in which the method does nothing, for one that may start elsewhere than at the pretrained model."""
    departure: float | None = None
    """Set by Stack.probe where there is `without`: how far the outputs are from those without it, largest difference
    over largest output."""
    calibration: Calibration | None = None
    """What is to be done once between attach and the optimizer, unless unpack() fills the method; None is nothing."""
    merges: bool = False
    """After merge() the weights alone hold this method, unless an edit that stays is before one of its own; False: it
    stays active in the merged model, as coeff does."""


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
        methods: name -> settings of a method, which have `kind` and `attach(backbone) -> Attachment`. Several may
            be of one kind, under names of their own.

    Raises:
        UserError: full is combined with another method, or a name cannot be that of a folder and of a module.
    """

    def __init__(self, methods: Mapping[str, Any]) -> None:
        self.methods = {
            name: settings.named(name) if hasattr(settings, "named") else settings for name, settings in methods.items()
        }
        self.attachments: list[Attachment] = []
        """What the methods did to the model of the last attach(), in order."""
        self.pretrained: frozenset[str] = frozenset()
        """Names of the parameters that this model had before, the head's among them."""
        for name in self.methods:
            _check_name(name)
        full = next((name for name, settings in self.methods.items() if settings.kind == "full"), None)
        if full and len(self.methods) > 1:
            others = ", ".join(name for name in self.methods if name != full)
            raise UserError(
                f"peft: {full} trains every weight already, so that {others} would train the same functions twice; "
                f"take {full} alone, or {others} without {full}"
            )

    def attach(self, backbone: Backbone, seed: int) -> None:
        """Freeze the model, unfreeze its head, and attach every method in order, each drawn from its own seed.

        Batch norms whose scale stays frozen keep their statistics in training too: a frozen model must not drift.

        Raises:
            UserError: a method does not fit the model, attaches to nothing, or trains what another one trains.
        """
        self.attachments = []
        self.pretrained = frozenset(name for name, _ in backbone.model.named_parameters(remove_duplicate=False))
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(False)
        for parameter in backbone.head_parameters().values():
            parameter.requires_grad_(True)
        for name, settings in self.methods.items():
            reseed(seed, "adapter", name)
            attachment = settings.attach(backbone)
            attachment.kind = settings.kind
            if not attachment.places:
                raise UserError(f"peft.{name} attaches to nothing in {backbone.name}")
            self.attachments.append(attachment)
        _check_owners(backbone, self.parameters())
        for module in backbone.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.weight is None or not module.weight.requires_grad:
                    module.register_forward_pre_hook(_keep_statistics)

    def calibrate(self, backbone: Backbone, draw: Callable[[int, int], Iterable[Any]], loss: Loss, seed: int) -> None:
        """Let the methods that choose by data what they train do so, in order, each drawn from its own seed.

        Call it once, after attach and before an optimizer takes the parameters; load_adapter needs none of it. The
        model is in evaluation mode meanwhile, so that dropout draws nothing. Leaves no trace: no gradients, training
        modes and random generators as they were.

        Args:
            draw: (number of batches, samples of each) -> batches of training samples.
            loss: of one such batch.

        Raises:
            UserError: a loss is not finite, or the gradients do not tell the weights apart.
        """
        with evaluating(backbone.model), kept_generators(), torch.enable_grad():
            for attachment in self.attachments:
                if (calibration := attachment.calibration) is not None:
                    reseed(seed, "calibration", attachment.method)
                    calibration.run(draw(calibration.batches, calibration.batch_size), loss)
        _check_owners(backbone, self.parameters())

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

        output = check_called(model, probes, run, backbone.name)
        for attachment in self.attachments:
            if attachment.without is not None:
                with attachment.without():
                    attachment.departure = _apart(output, check_called(model, (), run, backbone.name))
        return output

    def check(self) -> None:
        """What can be found wrong before a model is loaded.

        Raises:
            UserError: settings do not fit the library that they are for; all that is wrong, one line each.
        """
        wrong: list[str] = []
        for settings in self.methods.values():
            try:
                getattr(settings, "check", lambda: None)()
            except UserError as error:
                wrong += str(error).splitlines()
        if wrong:
            raise UserError("\n".join(wrong))

    def starts(self) -> list[str]:
        """After probe(), a sentence on every method that does not start at the model as those before it left it."""
        return [
            f"peft.{a.method} does not start at the pretrained model: outputs of the probe differ by {a.departure:.2g} "
            "of the largest"
            for a in self.attachments
            if a.departure is not None and a.departure > 1e-4
        ]

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Method -> name in model.named_parameters() -> parameter that it trains."""
        return {attachment.method: dict(attachment.parameters) for attachment in self.attachments}

    def report(self) -> list[Row]:
        """What every method attached to, and by which route."""
        return [Row(a.method, p.name, p.route, p.num_parameters) for a in self.attachments for p in a.places]


def _check_name(name: str) -> None:
    """A method's name is a folder of the adapter and a key of an nn.ModuleDict."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or name == "head" or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"peft: {name!r} cannot be the name of a method in a stack; take letters, digits and _, and no word that "
            "torch's modules use, such as lora_2"
        )


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

    handles = [module.register_forward_hook(note) for _, _, module in probes]
    try:
        # not inference_mode: tensors that a model caches in this forward must serve in training later
        with evaluating(model), torch.no_grad():
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    silent: dict[str, list[str]] = {}
    for method, place, module in probes:
        if id(module) not in called:
            silent.setdefault(method, []).append(place)
    if silent:
        found = [f"peft.{method} is never called at {_listed(places)}" for method, places in silent.items()]
        raise UserError(f"{name} bypasses modules that a method acts through: {'; '.join(found)}")
    return output


def _apart(output: Any, other: Any) -> float:
    """The largest difference of two outputs of a model over the largest output."""
    one, two = (value if isinstance(value, Tensor) else value.logits for value in (output, other))
    if not one.numel():
        return 0.0
    return float((one - two).abs().max()) / max(float(two.abs().max()), torch.finfo(torch.float32).tiny)


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
    """Fold every update into the weight of its layer, and every edit that its layer can hold, in place; twice is once.

    Afterwards those layers have their original types and state-dict keys again. Returns the methods that cannot be
    folded and are still active; `stack` then holds these alone.

    Raises:
        UserError: a method stays whose place in the order matters, see Adapted.merged.
    """
    merge_layers(backbone.model)
    stay = fold_edits(backbone.model)
    stack.attachments = [a for a in stack.attachments if not a.merges or a.method in stay]
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


def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill the targets from tensors of the same names and shapes.

    Raises:
        UserError: names tensors that are missing, unexpected, of another shape or type, or not finite; nothing is
            filled then.
    """
    wrong = [f"{name} is missing" for name in targets if name not in tensors]
    wrong += [f"{name} is unexpected" for name in tensors if name not in targets]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(target.shape)}"
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    ]
    for name, target in targets.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not target.is_floating_point():
            if tensor.is_floating_point():  # copy_ would cut the fractions off
                wrong.append(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, not of whole numbers")
        elif not tensor.is_floating_point():
            wrong.append(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, not of a floating type")
        elif not bool(torch.isfinite(tensor).all()):
            wrong.append(f"{name} holds values that are not finite")
    if wrong:
        raise UserError(f"{where}: the adapter does not fit: {_listed(wrong, '; ')}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

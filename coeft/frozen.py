"""What frozen layers below the first trained one give, computed once for every sample (trainer.cache_frozen).

A stack that adapts the last blocks alone, or only trains the head, leaves the first blocks as they are: without
augmentation and without dropout there, they give the same for a sample in every epoch and every fold. `find` looks for
the last place up to which that holds, by trying; `Kept` computes what arrives there for all samples, and lets the model
start from it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coeft import ranks
from coeft.assemble import Assembled
from coeft.config import TrainConfig
from coeft.data._folds import Fold
from coeft.data._part import Batch, Part
from coeft.errors import UserError
from coeft.memory import MIB, free_memory, unchanged
from coeft.module import Cut
from coeft.precision import computing

log = logging.getLogger("coeft")

SHARE = 4  # auto takes at most this part of the free memory
PARTS = ("train", "val", "heldout", "test")


@dataclass
class FeatureStore:
    """Inputs of the cut for some samples of a store, a Store itself."""

    features: Tensor
    """(n, ...), in the type that the model computed them in."""
    places: np.ndarray
    """int64: row of the original store -> row of features, -1 where there is none."""

    def fetch(self, rows: np.ndarray) -> Tensor:
        """Features of these rows of the original store."""
        return self.features[torch.from_numpy(self.places[rows])]

    def batch(self, fetched: Tensor | list[Tensor]) -> Batch:
        """As the module takes them."""
        return {"features": torch.stack(fetched) if isinstance(fetched, list) else fetched}


class Kept:
    """The features of a run, for the folds that can use them.

    Args:
        cfg: of the run.
        folds: all that will be trained.
    """

    def __init__(self, cfg: TrainConfig, folds: list[Fold]) -> None:
        self.cfg, self.folds = cfg, folds
        self.cut: str | None = None
        self.stores: dict[int, FeatureStore] | None = None
        """id of a store -> what is there instead."""

    def use(self, built: Assembled, fold: Fold) -> Fold:
        """The fold over features, after they were computed by its model if they were not; else the fold as it is.

        Raises:
            UserError: trainer.cache_frozen=true, and it cannot be.
        """
        wish = self.cfg.trainer.cache_frozen
        if wish is False:
            return fold
        found = self._reason(built, fold)
        if isinstance(found, str):
            if wish is True:
                raise UserError(f"trainer.cache_frozen=true: {found}; leave it at auto")
            return fold
        built.module.cut = found
        assert self.stores is not None
        parts: dict[str, Any] = {name: self._part(part) for name in PARTS if (part := getattr(fold, name)) is not None}
        return replace(fold, **parts)

    def _reason(self, built: Assembled, fold: Fold) -> Cut | str:
        """Where the model may start, with features at hand, or why it may not."""
        if built.backbone.modality == "text":
            return "features of texts are not kept, since they depend on the texts beside them in a batch"
        if built.module.augment is not None:
            return "data.augment gives other samples in every epoch"
        if ranks.place().world > 1:
            return "several processes train"
        cut = find(built, fold.train)
        if cut is None:
            return f"{built.backbone.name} has no block behind others that stay as they are throughout the training"
        if self.cfg.trainer.compile and cut.name in built.backbone.blocks:
            return "trainer.compile=true compiles the block that would start from kept features"
        if self.stores is None:
            need = self._bytes(built, cut, fold)
            if self.cfg.trainer.cache_frozen == "auto" and need > free_memory() // SHARE:
                log.info("frozen features would take %s MiB: not kept", f"{need / MIB:,.0f}")
                return "memory"
            self._compute(built, cut)
        if cut.name != self.cut:
            return f"fold {fold.index} trains other layers than the first"
        return cut

    def _rows(self) -> dict[int, tuple[Any, np.ndarray]]:
        """id of a store -> itself and the rows of it that any fold uses."""
        used: dict[int, tuple[Any, list[np.ndarray]]] = {}
        for fold in self.folds:
            for part in (getattr(fold, name) for name in PARTS):
                for number, store in enumerate(part.stores if part is not None else []):
                    used.setdefault(id(store), (store, []))[1].append(part.rows[part.rows[:, 0] == number, 1])
        return {key: (store, np.unique(np.concatenate(rows))) for key, (store, rows) in used.items()}

    def _bytes(self, built: Assembled, cut: Cut, fold: Fold) -> int:
        [one] = inputs_of(built, cut, fold.train.batch([0]))
        return sum(len(rows) for _, rows in self._rows().values()) * one.numel() * one.element_size()

    def _compute(self, built: Assembled, cut: Cut) -> None:
        self.cut, self.stores, size = cut.name, {}, self.cfg.data.batch_size
        if torch.cuda.is_available():
            built.module.cuda()
        kept = 0
        with unchanged(built.module):
            built.module.eval()
            for key, (store, rows) in self._rows().items():
                features: Tensor | None = None
                for first in range(0, len(rows), size):
                    found = inputs_of(built, cut, store.batch(store.fetch(rows[first : first + size]))).cpu()
                    if features is None:
                        features = found.new_empty(len(rows), *found.shape[1:])
                    features[first : first + len(found)] = found
                if features is None:
                    continue
                places = np.full(int(rows.max()) + 1, -1)
                places[rows] = np.arange(len(rows))
                self.stores[key] = FeatureStore(features, places)
                kept += features.nbytes
        log.info(
            "the layers below %s are frozen: computed once, %s MiB (trainer.cache_frozen)",
            cut.name, f"{kept / MIB:,.0f}",
        )  # fmt: skip

    def _part(self, part: Part) -> Part:
        assert self.stores is not None
        return replace(part, stores=[self.stores.get(id(store), store) for store in part.stores])


def inputs_of(built: Assembled, cut: Cut, batch: Batch) -> Tensor:
    """What arrives at the cut for a batch of images, (B, ...); the rest of the model does not run."""
    device = built.module.device
    inputs = built.module.prepared({name: value.to(device) for name, value in batch.items()})
    place = built.backbone.model.get_submodule(cut.name)
    handle = place.register_forward_pre_hook(_stop)
    try:
        with torch.no_grad(), computing(built.module.precision, device):
            built.backbone.forward(inputs)
    except _Arrived as arrived:
        return arrived.value
    finally:
        handle.remove()
    raise RuntimeError(f"{cut.name} was not called")


class _Arrived(Exception):
    """Carries what a module was given out of a forward."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _stop(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Arrived(args[0])


def find(built: Assembled, part: Part) -> Cut | None:
    """The last block, or the head, whose inputs are the same whatever is trained, and in training mode; None is none.

    Two samples go through the model twice, as it is in evaluation mode and with every trained parameter changed in
    training mode. At the place the inputs must be equal to the bit and no random number may have been drawn. Then the
    model must give the same from there as from the start, to the bit, in both modes. Leaves no trace.
    """
    backbone, module = built.backbone, built.module
    places = [*backbone.blocks, *([backbone.head] if backbone.head else [])]
    batch = {name: value.to(module.device) for name, value in part.batch(range(min(2, len(part)))).items()}
    with unchanged(module), torch.no_grad():
        module.eval()
        plain = _watched(built, places, batch)
        module.train()
        with _changed(module):
            other = _watched(built, places, batch)
        for number, name in reversed(list(enumerate(places))[1:]):
            one, two = plain.get(name), other.get(name)
            if one is None or two is None or two[1] or not torch.equal(one[0], two[0]):
                continue
            cut = Cut(name=name, skipped={block: plain[block][2] for block in places[:number] if block in plain})
            return cut if _same(built, cut, batch, one[0]) else None
    return None


def _watched(built: Assembled, places: list[str], batch: Batch) -> dict[str, tuple[Tensor, bool, bool]]:
    """Place -> the first argument of its only call, whether random numbers were drawn before, and whether it gives a
    tuple."""
    found: dict[str, tuple[Tensor, bool, bool]] = {}
    calls: dict[str, int] = {}
    handles = []
    before = _generators()

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if args and isinstance(args[0], Tensor):
                found[name] = inputs[name], drawn[name], isinstance(output, tuple)

        return look

    inputs: dict[str, Tensor] = {}
    drawn: dict[str, bool] = {}

    def enter(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[name], drawn[name] = args[0].clone(), not torch.equal(_generators(), before)

        return look

    for name in places:
        place = built.backbone.model.get_submodule(name)
        handles += [place.register_forward_pre_hook(enter(name)), place.register_forward_hook(watch(name))]
    try:
        built.module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value for name, value in found.items() if calls[name] == 1}


def _generators() -> Tensor:
    """The state of the random generators."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state()]) if torch.cuda.is_available() else state


@contextmanager
def _changed(module: nn.Module) -> Iterator[None]:
    """Every trained parameter is another one."""
    kept = {parameter: parameter.detach().clone() for parameter in module.parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in kept:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter))
        yield
    finally:
        for parameter, value in kept.items():
            parameter.copy_(value)


def _same(built: Assembled, cut: Cut, batch: Batch, features: Tensor) -> bool:
    """Whether the model gives the same from the cut as from the start."""
    module, before = built.module, built.module.cut
    try:
        for training in (False, True):
            module.train(training)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                whole = module(batch)
            module.cut = cut
            with torch.random.fork_rng():
                torch.manual_seed(0)
                short = module({"features": features, "labels": batch["labels"]})
            module.cut = before
            if not torch.equal(whole, short):
                return False
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # a model that needs what was left out
        return False
    finally:
        module.cut = before
    return True

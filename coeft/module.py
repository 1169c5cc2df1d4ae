"""The LightningModule: one model with its stack, one task, one optimizer."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.optim._schedule import factor
from coeft.precision import computing
from coeft.seeding import reseed
from coeft.tasks._task import Task

if TYPE_CHECKING:
    from coeft.data._transforms import Transform

log = logging.getLogger("coeft")

TOLD = 5  # steps left out that are told one by one


@dataclass
class Step:
    """What an optimizer step has been over so far."""

    loss: float = 0.0
    """Sum over the units of `Task.weight`."""
    weight: int = 0
    samples: int = 0

    def add(self, loss: float, batch: Mapping[str, Tensor], task: Task) -> int:
        """Count a micro-batch and its mean loss; its units. One that only fills up a process's share has none."""
        if "filler" in batch:
            return 0
        weight = task.weight(batch)
        self.loss += loss * weight
        self.weight += weight
        self.samples += int(batch["texts"].sum()) if "texts" in batch else len(batch["labels"])
        return weight

    def over_processes(self, strategy: Any, device: torch.device) -> "Step":
        """The sums over all processes."""
        sums = torch.tensor([self.loss, self.weight, self.samples], dtype=torch.float64, device=device)
        loss, weight, samples = strategy.reduce(sums, reduce_op="sum").tolist()
        return Step(loss=loss, weight=int(weight), samples=int(samples))


class MeanLoss(Metric):
    """The mean loss over the units of all batches and processes.

    Lightning's own mean over processes is wrong where the number of units does not divide: it takes the mean number of
    a process as an integer.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: int) -> None:
        """Mean loss of a batch over so many units."""
        self.total += loss * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return self.total / self.weight


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place at which a model may start, because what arrives there was kept; see coeft/frozen.py."""

    name: str
    """A block, or the head."""
    skipped: dict[str, bool]
    """The blocks before it, and whether they give tuples."""

    @contextmanager
    def start(self, model: nn.Module, features: Tensor) -> Iterator[None]:
        """A context in which the forward of the model gives what it would if these features had arrived here, (B, ...).

        The model's first input must still be there, of any content: it passes by the blocks that are left out.
        """

        def instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (features, *args[1:])

        children = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.skipped]
        kept = [parent._modules[child] for parent, child in children]
        handle = model.get_submodule(self.name).register_forward_pre_hook(instead, prepend=True)
        try:
            for (parent, child), gives_tuple in zip(children, self.skipped.values(), strict=True):
                parent._modules[child] = _Pass(gives_tuple)
            yield
        finally:
            handle.remove()
            for (parent, child), module in zip(children, kept, strict=True):
                parent._modules[child] = module


class _Pass(nn.Module):
    """In place of a block: gives what it is given."""

    def __init__(self, gives_tuple: bool) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if self.gives_tuple else hidden


class TuningModule(L.LightningModule):
    """Trains what a stack left trainable; checkpoints hold only that.

    Every training batch reseeds from (seed, fold, epoch, batch), so that dropout and augmentation follow from the
    position in the run and a resumed run needs no generator state.
    """

    strict_loading = False  # checkpoints do not hold the frozen weights

    def __init__(
        self,
        backbone: Backbone,
        stack: Stack,
        task: Task,
        *,
        optim: Any = None,
        prepare: "Transform | None" = None,
        augment: "Transform | None" = None,
        seed: int = 0,
        fold: int = 0,
        on_nan: str = "stop",
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.model = backbone.model
        self.prepare: Transform | None = prepare
        self.augment: Transform | None = augment
        self.backbone, self.stack, self.task, self.optim = backbone, stack, task, optim
        self.seed, self.fold = seed, fold
        self.precision = precision
        """fp32 or bf16: what the model computes in."""
        self.cut: Cut | None = None
        """Where the model starts, for batches with `features` in place of images."""
        self.val_metrics, self.test_metrics = task.metrics(), task.metrics()
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()
        self.extras: dict[str, Any] = {}
        """What the task has beyond numbers of the last test."""
        self.samples_seen = 0
        """In training, over all processes."""
        self.on_nan = on_nan
        self.bad_loss: float | None = None  # of the optimizer step so far, if it is not finite
        self.steps = self.left_out = 0  # of this epoch
        self.skipped_steps = 0
        """Optimizer steps of the fold that were left out because a loss or a gradient was not finite."""
        self.step = Step()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A batch of the data to what the task takes as logits, such as (B, num_outputs)."""
        inputs = self.prepared(batch)
        with ExitStack() as contexts:
            contexts.enter_context(computing(self.precision, self.device))
            if "features" in batch:
                assert self.cut is not None
                contexts.enter_context(self.cut.start(self.model, batch["features"]))
            return self.task.forward(self.backbone, inputs, batch, training=self.training)

    def prepared(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch without its labels as the backbone takes it: uint8 images normalised, sounds as pictures."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "filler", "features")}
        if "features" in batch:  # of the right shape for what is left of the way to the cut
            blank = {name: value.to(self.device) for name, value in self.backbone.example().items()}
            if self.prepare is not None:
                blank = {self.prepare.gives: self.prepare(blank[self.prepare.takes])}
            inputs |= {name: value.expand(len(batch["features"]), *value.shape[1:]) for name, value in blank.items()}
            return inputs
        if self.prepare is not None:
            inputs[self.prepare.gives] = self.prepare(inputs.pop(self.prepare.takes))
        return inputs

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        rank = ("rank", self.global_rank) if self.global_rank else ()  # processes do not share a dropout mask
        reseed(self.seed, "step", self.fold, self.current_epoch, batch_idx, *rank)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.augment is not None:
            batch = {**batch, self.augment.takes: self.augment(batch[self.augment.takes])}
        loss = self.task.loss(self(batch), batch, training=True)
        value = float(loss.detach())  # once: on a GPU this waits for the forward
        weight = self.step.add(value, batch, self.task)
        if not math.isfinite(value):
            self.bad_loss = value
            loss = loss * math.nan  # in every gradient, so that all processes find it before they step
        if self.trainer.world_size == self.trainer.accumulate_grad_batches == 1:
            return loss
        # The sum over the units: their number in the whole step is only known at its end. Lightning will divide by
        # the number of micro-batches, which is undone here.
        return loss * (weight * self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the step out, or stop, if the gradient is not finite; give it its scale before it is clipped."""
        self.steps += 1
        step, self.step = self.step, Step()
        if self.trainer.world_size > 1:
            step = step.over_processes(self.trainer.strategy, self.device)
        self.samples_seen += step.samples
        if math.isfinite(step.loss):
            self.log("train/loss", step.loss / step.weight, on_step=True, on_epoch=False, prog_bar=True)
        self.log("lr", optimizer.param_groups[0]["lr"], on_step=True, on_epoch=False)
        if not finite(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            self._leave_out(optimizer)
        if self.trainer.world_size > 1 or self.trainer.accumulate_grad_batches > 1:
            self._average(optimizer, step.weight)

    def _leave_out(self, optimizer: Any) -> None:
        """Without gradients the optimizer changes neither a parameter nor its own state.

        Raises:
            UserError: trainer.on_nan=stop.
        """
        bad, self.bad_loss = self.bad_loss, None
        what = "the gradient is not finite" if bad is None else f"the loss is {bad}"
        where = f"at epoch {self.current_epoch}, step {self.global_step}, fold {self.fold}"
        if self.on_nan == "stop":
            raise UserError(
                f"{what} {where}: lower optim.lr ({self.optim.lr:g}) or the learning rates of the methods, or set "
                "trainer.clip_norm; trainer.on_nan=skip leaves such steps out. Nothing of this epoch is kept, the "
                "epochs before it are"
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.left_out += 1
        self.skipped_steps += 1
        if self.skipped_steps <= TOLD:
            more = "; further ones are only counted" if self.skipped_steps == TOLD else ""
            log.warning("%s %s: the step is left out (trainer.on_nan=skip)%s", what, where, more)

    def _average(self, optimizer: Any, weight: int) -> None:
        """Turn the gradient of the sum into that of the mean over the step's units, of which there are `weight`."""
        share = self.trainer.world_size / weight  # gradients are means over processes
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(share)

    def on_train_epoch_start(self) -> None:
        self.steps = self.left_out = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.on_nan != "skip":
            return
        self.log("train/skipped", float(self.skipped_steps), on_step=True, on_epoch=False)
        if self.trainer.is_last_batch and self.left_out == self.steps:
            raise UserError(
                f"every step of epoch {self.current_epoch}, fold {self.fold} was left out: no loss or no gradient was "
                f"finite; lower optim.lr ({self.optim.lr:g}) or the learning rates of the methods, and look for values "
                "in the data that are too large"
            )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch)
        self.task.update(self.val_metrics, logits, batch)
        loss = self.task.loss(logits, batch, training=False)
        self.val_loss.update(loss, self.task.weight(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute(), prog_bar=True)
        self.val_loss.reset()
        scalars, _ = self.task.compute(self.val_metrics)
        self.val_metrics.reset()
        for name, value in scalars.items():
            self.log(f"val/{name}", value, prog_bar=name == self.task.metric)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch)
        self.task.update(self.test_metrics, logits, batch)
        loss = self.task.loss(logits, batch, training=False)
        self.test_loss.update(loss, self.task.weight(batch))

    def on_test_epoch_end(self) -> None:
        self.log("loss", self.test_loss.compute())
        self.test_loss.reset()
        scalars, self.extras = self.task.compute(self.test_metrics)
        self.test_metrics.reset()
        self.log_dict(scalars)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.optim.build(self.parameter_groups())
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(self.optim.schedule, self.optim.warmup_fraction, step, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group per method and one for the head, each with its own lr and weight_decay.

        The weight decay of the optimizer leaves one-dimensional parameters alone; one that a method or the head sets
        for itself holds for all of its parameters.
        """
        groups = []
        owned = {name: list(parameters.values()) for name, parameters in self.stack.parameters().items()}
        settings = {**self.stack.methods, "head": self.optim.head}
        for name, parameters in {**owned, "head": list(self.backbone.head_parameters().values())}.items():
            lr = self.optim.lr if settings[name].lr is None else settings[name].lr
            own_decay = settings[name].weight_decay
            flat = [p for p in parameters if p.ndim < 2]
            rest = [p for p in parameters if p.ndim >= 2]
            decay = self.optim.weight_decay if own_decay is None else own_decay
            for members, weight_decay in ((rest, decay), (flat, own_decay or 0.0)):
                if members:
                    groups.append({"params": members, "lr": lr, "weight_decay": weight_decay, "name": name})
        return groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        buffers = {f"model.{name}" for name, _ in self.model.named_buffers()}
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in trained | buffers
        }
        for name in sorted(trained):
            if not finite([checkpoint["state_dict"][name]]):
                raise UserError(
                    f"the weights are no longer finite after epoch {self.current_epoch}, fold {self.fold} (the first: "
                    f"{name}): lower optim.lr ({self.optim.lr:g}) or the learning rates of the methods. Nothing of "
                    "this epoch is kept, the epochs before it are"
                )
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint.get("skipped_steps", 0)


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is infinite or NaN: the largest absolute value says so, which cannot overflow as a sum can."""
    held = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(held, math.inf)))

"""The LightningModule: one model with its stack, one task, one optimizer."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone
from coeft.errors import UserError
from coeft.optim._schedule import factor
from coeft.seeding import reseed
from coeft.tasks._classification import ClassificationTask, split_confusion


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
        task: ClassificationTask,
        *,
        optim: Any = None,
        prepare: nn.Module,
        augment: nn.Module | None = None,
        seed: int = 0,
        fold: int = 0,
    ) -> None:
        super().__init__()
        self.model = backbone.model
        self.prepare = prepare
        self.augment = augment
        self.backbone, self.stack, self.task, self.optim = backbone, stack, task, optim
        self.seed, self.fold = seed, fold
        self.val_metrics, self.test_metrics = task.metrics(), task.metrics()
        self.val_loss_sum = self.test_loss_sum = 0.0
        self.confusion: Tensor | None = None
        self.samples_seen = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) to logits (B, num_classes)."""
        return self.model(self.prepare(pixel_values))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        reseed(self.seed, "step", self.fold, self.current_epoch, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = batch["pixel_values"]
        if self.augment is not None:
            images = self.augment(images)
        loss = self.task.loss(self(images), batch["labels"], training=True)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss.detach())} at epoch {self.current_epoch}, step {self.global_step}: "
                f"lower optim.lr ({self.optim.lr:g}) or the learning rates of the methods, or set trainer.clip_norm"
            )
        self.samples_seen += len(images)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self.log("lr", optimizer.param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["pixel_values"])
        self.val_metrics.update(logits, batch["labels"])
        loss = self.task.loss(logits, batch["labels"], training=False)
        self.log("val/loss", loss, batch_size=len(logits), on_epoch=True, prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        scalars, _ = split_confusion(self.val_metrics.compute())
        self.val_metrics.reset()
        for name, value in scalars.items():
            self.log(f"val/{name}", value, prog_bar=name == self.task.metric)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["pixel_values"])
        self.test_metrics.update(logits, batch["labels"])
        loss = self.task.loss(logits, batch["labels"], training=False)
        self.log("loss", loss, batch_size=len(logits), on_epoch=True, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        scalars, self.confusion = split_confusion(self.test_metrics.compute())
        self.test_metrics.reset()
        self.log_dict(scalars)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["pixel_values"])

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

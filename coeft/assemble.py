"""From a config to a model that can be trained or used: backbone, head, stack, LightningModule, Trainer."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from coeft import adapter_io, precision, ranks
from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone, Fbank, Hearing, Preprocessing
from coeft.config import TrainConfig, allowed_by
from coeft.data._images import ImageEncoder, resolve_preprocessing
from coeft.data._part import Batch, Encoder, Part
from coeft.data._settings import check_text
from coeft.data._transforms import Augment, Normalize, Transform
from coeft.data.audio_folder import AudioFolder
from coeft.errors import UserError
from coeft.modes import evaluating
from coeft.module import TuningModule
from coeft.run import Run
from coeft.seeding import derive

log = logging.getLogger("coeft")


@dataclass(kw_only=True)
class Assembled:
    """A model with its stack attached, ready for the Trainer."""

    backbone: Backbone
    stack: Stack
    module: TuningModule
    base: dict[str, Any]
    """Fingerprint of the base model from before anything was attached."""


def build_backbone(cfg: TrainConfig) -> Backbone:
    """The base model without a head of the task's own, and what inputs it wants."""
    Stack(dict(cfg.peft)).check()
    backbone = cfg.backbone.build(num_classes=0, seed=cfg.seed, image_size=cfg.data.image_size, head=cfg.task.head)
    if backbone.preprocessing is not None:
        backbone.preprocessing = resolve_preprocessing(cfg.data, backbone.preprocessing)
    if isinstance(cfg.data, AudioFolder) and backbone.modality != "text":
        from coeft.data._audio import resolve_hearing

        backbone.hearing = resolve_hearing(cfg.data, backbone)
    return backbone


def encoder(cfg: TrainConfig, backbone: Backbone) -> Encoder:
    """What turns the samples of the data into the backbone's inputs.

    Raises:
        UserError: the data has nothing that the backbone takes, settings of images are given for text, or the backbone
            came without a tokenizer.
    """
    if backbone.hearing is not None:
        from coeft.data._audio import AudioEncoder

        return AudioEncoder(backbone.hearing, waveforms=bool(cfg.data.on_waveforms))
    if backbone.modality == "audio":
        raise UserError(
            f"data={cfg.data.kind} has no sound, but {backbone.name} takes sound: data=audio_folder has some"
        )
    if backbone.modality == "image":
        assert backbone.preprocessing is not None
        return ImageEncoder(backbone.preprocessing)
    check_text(cfg.data, backbone.name)
    if backbone.tokenizer is None:
        raise UserError(f"{backbone.name} comes without a tokenizer: add its files (tokenizer.json) to the folder")
    return cfg.task.encoder(cfg.data, backbone)


def assemble(cfg: TrainConfig, backbone: Backbone, num_outputs: int, *, fold: int = 0) -> Assembled:
    """Give a base model a fresh head and attach the stack, both drawn from the fold's own seed."""
    base = adapter_io.fingerprint(backbone.model, backbone.heads)
    if num_outputs:
        backbone.new_head(num_outputs, derive(cfg.seed, "fold", fold))
    stack = Stack(dict(cfg.peft))
    stack.attach(backbone, derive(cfg.seed, "fold", fold))
    prepare, augment = transforms(cfg, backbone)
    module = TuningModule(
        backbone,
        stack,
        cfg.task.build(num_outputs),
        optim=cfg.optim,
        prepare=prepare,
        augment=augment,
        seed=cfg.seed,
        fold=fold,
        on_nan=cfg.trainer.on_nan,
        precision=precision.choose(cfg.trainer.precision, backbone.model),
    )
    return Assembled(backbone=backbone, stack=stack, module=module, base=base)


def transforms(cfg: TrainConfig, backbone: Backbone) -> tuple[Transform | None, Transform | None]:
    """What every batch goes through before the model, and what training batches go through before that."""
    images, hearing = backbone.preprocessing, backbone.hearing
    if hearing is not None:
        from coeft.data._sound_transforms import Features, Picture, SoundAugment

        prepare = Features(hearing) if images is None else Picture(hearing, images)
        return prepare, SoundAugment(cfg.data, hearing) if cfg.data.augment else None
    if images is None:
        return None, None
    return Normalize(images.mean, images.std), Augment(cfg.data.augment, images) if cfg.data.augment else None


def restore(cfg: TrainConfig, adapter: Path) -> tuple[Assembled, list[str]]:
    """The model of a finished run, or of one of its folds, and its class names.

    Raises:
        UserError: the adapter is damaged or the base model is not the one it was trained on.
    """
    manifest = adapter_io.read_manifest(adapter)
    class_names = adapter_io.read_class_names(adapter)
    if cfg.task.target in ("class", "classes") and not class_names:
        raise UserError(f"{adapter}/head.safetensors names no classes, which the task {cfg.task.kind} needs")
    adapter_io.check_stack(manifest, cfg.peft, adapter)
    backbone = build_backbone(cfg)
    adapter_io.check_base(
        manifest["base_model"], adapter_io.fingerprint(backbone.model, backbone.heads), f"the adapter {adapter}"
    )
    built = assemble(cfg, backbone, adapter_io.outputs(manifest, class_names, adapter))
    fill(adapter, built)
    return built, class_names


def fill(adapter: Path, built: Assembled) -> None:
    """Load an adapter's weights; its scale of the head's outputs is then the task's too."""
    adapter_io.fill(adapter, built.backbone, built.stack)
    if built.backbone.scale is not None:
        built.module.task.use_scale(built.backbone.scale)


def start_from(cfg: TrainConfig, built: Assembled) -> None:
    """Fill a fresh stack and head from cfg.init_from, a run or an adapter with the same stack."""
    path = Path(cfg.init_from or "").expanduser()
    if (path / "config.yaml").exists():
        path = Run.open(path, allowed=allowed_by(cfg)).adapter()
    manifest = adapter_io.read_manifest(path)
    theirs = list(adapter_io.read_stack(manifest, f"{path}/coeft.json").methods)
    if theirs != list(built.stack.methods):
        raise UserError(
            f"init_from: {path} holds the stack [{', '.join(theirs)}], not [{', '.join(built.stack.methods)}]"
        )
    adapter_io.check_base(manifest["base_model"], built.base, f"init_from: the adapter {path}")
    fill(path, built)


def check_forward(built: Assembled, part: Part) -> None:
    """Send one or two samples through the model, which must call every method of the stack.

    Raises:
        UserError: a method is not called, or the model cannot take samples of this size.
    """
    batch = part.batch(range(min(2, len(part))))
    built.module.task.check(built.backbone)
    try:
        built.stack.probe(built.backbone, built.module.prepared(batch))
    except (RuntimeError, AssertionError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items() if name != "labels")
        reason = str(error).splitlines()[0]
        raise UserError(f"{built.backbone.name} fails on {shapes}: {reason}") from error


def calibrate(built: Assembled, part: Part) -> None:
    """Let the methods of the stack choose by samples of the training part what they train, see Stack.calibrate.

    The samples are drawn from the fold's seed, without augmentation, so that a resumed run chooses the same again.

    Raises:
        UserError: a method cannot choose by these samples.
    """
    module = built.module
    seed = derive(module.seed, "fold", module.fold)

    def draw(batches: int, batch_size: int) -> Iterator[Batch]:
        order = np.random.default_rng(derive(seed, "calibration")).permutation(len(part))[: batches * batch_size]
        for start in range(0, len(order), batch_size):
            yield part.batch(order[start : start + batch_size])

    def loss(batch: Batch) -> Tensor:
        task = module.task
        return task.loss(
            task.forward(built.backbone, module.prepared(batch), batch, training=True), batch, training=True
        )

    built.stack.calibrate(built.backbone, draw, loss, seed)


def all_take_part(built: Assembled, part: Part) -> bool:
    """Whether the loss of a sample depends on every trained parameter; a model may have one that it does not use."""
    batch, module = part.batch(range(1)), built.module
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with evaluating(module):  # the statistics of normalisation layers stay as they are
        loss = module.task.loss(module(batch), batch, training=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return all(gradient is not None for gradient in found)


def set_threads(cfg: TrainConfig, recorded: int | None = None, *, processes: int = 1) -> int:
    """Apply trainer.threads; return the number of CPU threads in force.

    Args:
        recorded: the number of a run that is read again, which holds unless trainer.threads is set.
        processes: how many of this machine share what torch would take, where nothing else is said.
    """
    threads = cfg.trainer.threads or recorded
    if threads is None and processes > 1:
        threads = max(1, torch.get_num_threads() // processes)
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def settle(built: Assembled) -> Assembled:
    """Keep frozen weights as training and evaluation compute with them, once the stack is filled; twice is once.

    Exports and merges start from a model that was not settled: their weights have the base's own type.
    """
    if built.module.precision == "bf16":
        precision.store(built.backbone)
    return built


def micro_batch_size(cfg: TrainConfig, devices: int) -> int:
    """Samples per device and forward, such that a whole number of them makes data.batch_size.

    Raises:
        UserError: they do not divide.
    """
    batch, micro = cfg.data.batch_size, cfg.trainer.micro_batch_size
    if batch % devices:
        raise UserError(f"data.batch_size is {batch}: it must be a multiple of the {devices} devices")
    per_device = batch // devices
    if micro is None:
        return per_device
    if micro > per_device or per_device % micro:
        raise UserError(
            f"trainer.micro_batch_size is {micro}: it must divide the {per_device} samples per device and step"
        )
    return micro


def make_trainer(cfg: TrainConfig, root: Path, *, find_unused: bool = False, **kwargs: Any) -> L.Trainer:
    """A Lightning Trainer for fitting (give max_epochs, callbacks, loggers) or for evaluation.

    Args:
        find_unused: under several processes, some trained parameters may take no part in a step.
    """
    quiet()
    # nothing here reads uninitialised memory, so deterministic=True need not spend time on filling it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer = L.Trainer(
        accelerator="auto",
        precision="32-true",  # the module sees to it, for what runs outside of the Trainer too
        deterministic=True,
        default_root_dir=root,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **ranks.lightning_options(cfg.trainer, find_unused=find_unused),
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **kwargs},
    )
    if trainer.world_size > 1:
        # Lightning's handler of SIGTERM waits for the other processes, which have not got the signal; ours stays alone
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def quiet() -> None:
    """Silence what Lightning says of itself; its warnings about workers do not fit data that lies in memory."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings(
        "ignore", message=".*It is recommended to use `self.log.*sync_dist=True.*"
    )  # they are alike
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def describe_inputs(backbone: Backbone) -> str:
    """One line, such as "images: 28 x 28 px, squash, bicubic, mean [0.5], std [0.5]"."""
    if backbone.hearing is not None:
        return f"sound: {describe_hearing(backbone.hearing, backbone.preprocessing)}"
    if backbone.preprocessing is not None:
        return f"images: {describe_preprocessing(backbone.preprocessing)}"
    tokenizer = backbone.tokenizer
    return f"text: {type(tokenizer).__name__}, {len(tokenizer):,} tokens"


def describe_hearing(hearing: Hearing, preprocessing: Preprocessing | None) -> str:
    """Such as "16000 Hz, clips of 5 s, 128 mel bands (htk), 20 to 8000 Hz, windows of 64 ms every 10 ms, ..."."""
    rate, clip = hearing.sample_rate, f"{hearing.sample_rate} Hz, clips of {hearing.seconds:g} s"
    if isinstance(features := hearing.features, Fbank):
        normal = f"mean {features.mean:g}, std {features.std:g}"
        return f"{clip}, {features.bands} mel bands (kaldi) in {features.frames} frames of 10 ms, {normal}"
    window, hop = (1000 * samples / rate for samples in (features.n_fft, features.hop_length))
    bands = f"{features.n_mels} mel bands ({features.mel_scale})"
    edges = f"{features.f_min:g} to {features.f_max or rate / 2:g} Hz"
    shown = f"{features.low:g} to {features.high:g} dB of {features.reference}"
    assert preprocessing is not None
    picture = describe_preprocessing(replace(preprocessing, resize="squash"))
    return f"{clip}, {bands}, {edges}, windows of {window:g} ms every {hop:g} ms, {shown}; as pictures: {picture}"


def describe_preprocessing(preprocessing: Preprocessing) -> str:
    """Such as "28 x 28 px, squash, bicubic, mean [0.5], std [0.5]"."""
    height, width = preprocessing.image_size
    crop = f"crop {preprocessing.crop_pct:g}" if preprocessing.resize == "crop" else "squash"
    mean, std = ([round(value, 3) for value in values] for values in (preprocessing.mean, preprocessing.std))
    return f"{height} x {width} px, {crop}, {preprocessing.interpolation}, mean {mean}, std {std}"

"""Batches of one fold for Lightning, in an order that follows from the seed alone."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from coeft.data._balance import drawn, expected_draws, strata_of
from coeft.data._folds import Fold
from coeft.data._part import Batch, Part
from coeft.seeding import derive


class Samples(Dataset):
    """A part as a map-style data set that hands out whole batches."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Batch:
        """The batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The model's inputs and labels, see Part.batch."""
        return self.part.batch(indices)


def _whole(batch: Any) -> Any:
    """Samples makes batches itself, so there is nothing to collate."""
    return batch


def _ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


FILLER = -1  # in place of a sample, where a process has one sample less than others


class Filled(Dataset):
    """Training samples, of which a process may have one less than others: batches without fillers.

    A batch of nothing but a filler holds the first sample and a mark `filler`: its process goes through the model as
    the others do, which they wait for, and the sample must not count.
    """

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Batch:
        """The batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of samples, see Samples; FILLER is none."""
        real = [index for index in indices if index != FILLER]
        batch: Batch = self.samples.__getitems__(real or [0])  # type: ignore[attr-defined]
        return batch if real else batch | {"filler": torch.ones(1, dtype=torch.bool)}


class TrainOrder(DistributedSampler):
    """A new permutation each epoch, from derive(seed, "order", fold, epoch); each process takes its share of it.

    With `expected` draws of each sample and their `classes`, an epoch draws as often, some samples several times and
    some not at all (see coeft/data/_balance.py).

    The n-th batch of all processes together is what one process has as its n-th batch. Where they do not divide, some
    processes end with a FILLER, so that all have equally many batches. The base class only tells Lightning not to put
    a sampler of its own in the place of this one; rank and size are asked for late.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        fold: int,
        epoch: int = 0,
        expected: np.ndarray | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        self.expected, self.classes = expected, classes
        self.length = length
        self.seed = seed
        self.fold = fold
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iterator gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.length / _ranks()[1])

    def __iter__(self) -> Iterator[int]:
        rank, world = _ranks()
        rng = np.random.default_rng(derive(self.seed, "order", self.fold, self.epoch))
        if self.expected is None:
            order = rng.permutation(self.length)
        else:
            assert self.classes is not None
            order = drawn(self.expected, self.classes, rng)
        share = order[rank::world].tolist()
        return iter(share + [FILLER] * (len(self) - len(share)))


class EvalOrder(DistributedSampler):
    """Every sample once, in order; each process takes every world-th, so that no sample counts twice."""

    def __init__(self, length: int) -> None:
        self.length = length

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the order is always the same."""

    def __len__(self) -> int:
        rank, world = _ranks()
        return len(range(rank, self.length, world))

    def __iter__(self) -> Iterator[int]:
        rank, world = _ranks()
        return iter(range(rank, self.length, world))


def equal_batches(length: int, batch_size: int, world: int) -> int:
    """The batch size next to batch_size with which all processes have equally many batches of EvalOrder.

    With fewer batches a process would wait for ever in a collective operation of the others. It is batch_size or a
    smaller one, or a larger one if there is none but 1; with fewer samples than processes there is none at all.
    """
    fewest = length // world
    if length % world == 0 or fewest == 0:
        return batch_size
    sizes = [*range(batch_size, 1, -1), *range(batch_size + 1, fewest + 2)]
    # Some processes have one sample more: it opens another batch if the others' batches are full.
    return next((size for size in sizes if fewest % size), batch_size)


class FoldData(lightning.LightningDataModule):
    """Loaders of the parts of one fold; batches as Part.batch gives them.

    Args:
        batch_size: samples per process and training batch; the last batch of an epoch may be smaller.
        eval_batch_size: the same for validation, held-out and test batches.
        seed: of the order.
        num_workers: processes that fetch batches; the batches are the same for any number.
        balance: how even the classes are made in training, see ImageData.balance.
        capacity: put several training texts into rows of so many tokens; a row is a sample then. Null does not.
    """

    def __init__(
        self,
        fold: Fold,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        num_workers: int,
        balance: float = 0.0,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        self.samples: Dataset = Samples(fold.train)
        self.expected = self.classes = None
        if balance:
            labels = fold.train.labels
            width = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
            self.expected, self.classes = expected_draws(labels, width, balance), strata_of(labels)
        if capacity is not None:
            from coeft.data._language import PackedSamples

            self.samples = PackedSamples(fold.train, capacity, derive(seed, "rows", fold.index))
        self.fold = fold
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.start_epoch = 0
        """The first epoch that is trained. Lightning makes the first iterator, and workers fetch ahead, before it
        sets the sampler's epoch, so this has to be right before fit; a trainer that resumes is asked for it."""

    def train_dataloader(self) -> DataLoader:
        resumed = self.trainer.current_epoch if self.trainer is not None else 0
        epoch = max(self.start_epoch, resumed)
        order = TrainOrder(
            len(self.samples),  # type: ignore[arg-type]
            seed=self.seed,
            fold=self.fold.index,
            epoch=epoch,
            expected=self.expected,
            classes=self.classes,
        )
        return self._loader(Filled(self.samples), order, self.batch_size)

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader(self.fold.val)

    def heldout_dataloader(self) -> DataLoader | list:
        """For trainer.test(dataloaders=...): the fold that is scored once."""
        return self._eval_loader(self.fold.heldout)

    def test_dataloader(self) -> DataLoader | list:
        return self._eval_loader(self.fold.test)

    @staticmethod
    def evaluation_loader(part: Part, *, batch_size: int, num_workers: int) -> DataLoader:
        """Batches of a part in its order, for evaluation and prediction outside a fold."""
        size = equal_batches(len(part), batch_size, _ranks()[1])
        return DataLoader(
            Samples(part), batch_size=size, sampler=EvalOrder(len(part)), num_workers=num_workers, collate_fn=_whole
        )

    def _eval_loader(self, part: Part | None) -> DataLoader | list:
        """An empty list, which Lightning takes for no data, if there is no such part."""
        if part is None:
            return []
        size = equal_batches(len(part), self.eval_batch_size, _ranks()[1])
        return self._loader(Samples(part), EvalOrder(len(part)), size)

    def _loader(self, samples: Dataset, order: TrainOrder | EvalOrder, batch_size: int) -> DataLoader:
        return DataLoader(
            samples,
            batch_size=batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_whole,
            pin_memory=torch.cuda.is_available(),
            # A loader draws a seed for its workers; from here, not from the global generator of the training steps.
            generator=torch.Generator().manual_seed(derive(self.seed, "workers", self.fold.index)),
        )

"""Which samples make which batch, and where its randomness comes from.

Both are functions of seed, epoch and step alone, so a run can be cut anywhere and continued to the same weights.
Axis letters: B samples of a batch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError
from ..tasks import Batch, Task


def derive_seed(*parts: int | str) -> int:
    """A seed below 2^63 for one purpose, from the run's seed and what tells the purpose apart."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_globally(*parts: int | str) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, all devices."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of the training samples in an epoch, `(size,)` int64."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


class _Batches(Dataset):
    """Batches by number, fetched from a task; an error of the user's data travels as a value out of a worker."""

    def __init__(self, task: Task, split: str, parts: list[tuple[Tensor, int]], train: bool) -> None:
        self.task, self.split, self.parts, self.train = task, split, parts, train

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Batch | ConfigError:
        index, seed = self.parts[number]
        try:
            return self.task.fetch(self.split, index, train=self.train, generator=torch.Generator().manual_seed(seed))
        except ConfigError as error:
            return error


def _load(batches: _Batches, workers: int, device: torch.device) -> Iterator[Batch]:
    loader: Any = DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        pin_memory=device.type == "cuda",
        collate_fn=_as_is,
    )
    for batch in loader:
        if isinstance(batch, ConfigError):
            raise batch
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _as_is(batch: Any) -> Any:
    return batch


class TrainingData:
    """The training batches of a run.

    Args:
        task: opened.
        seed: of the run.
        batch_size: samples of an optimizer step over all processes.
        accumulate: parts of a process's share.
        rank, world: of this process.
        workers: loading processes.
        device: where batches go.

    Raises:
        ConfigError: a batch that cannot be divided, or that is larger than the training split.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        workers: int,
        device: torch.device,
    ) -> None:
        size = task.size("train")
        if batch_size > size:
            raise ConfigError(f"train.batch_size: {batch_size} is more than the {size} training samples there are.")
        if batch_size % (accumulate * world):
            raise ConfigError(
                f"train.batch_size: {batch_size} cannot be divided among {world} processes of {accumulate} parts."
            )
        task.check_batch(batch_size // (accumulate * world))
        self.task, self.seed, self.batch_size, self.accumulate = task, seed, batch_size, accumulate
        self.rank, self.world, self.workers, self.device = rank, world, workers, device
        self.steps_per_epoch = size // batch_size  # the incomplete last batch is left out; the order changes by epoch

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For the optimizer steps `start` to `stop - 1`, the parts of this process's share."""
        step = start
        while step < stop:
            epoch, offset = divmod(step, self.steps_per_epoch)
            last = min(self.steps_per_epoch, offset + stop - step)
            loaded = _load(self._batches(epoch, offset, last), self.workers, self.device)
            for _ in range(offset, last):
                yield [next(loaded) for _ in range(self.accumulate)]
                step += 1

    def _batches(self, epoch: int, first: int, last: int) -> _Batches:
        order = epoch_order(self.task.size("train"), self.seed, epoch)
        parts = []
        for i in range(first, last):
            whole = order[i * self.batch_size : (i + 1) * self.batch_size]
            shares = whole.view(self.accumulate, self.world, -1)[:, self.rank]
            for part, index in enumerate(shares):
                parts.append((index, derive_seed(self.seed, "augment", epoch, i, part, self.rank)))
        return _Batches(self.task, "train", parts, train=True)


def evaluation_batches(
    task: Task, split: str, *, batch_size: int, rank: int, world: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """All samples of a split once, in order, every `world`-th batch for this process."""
    chunks = torch.arange(task.size(split)).split(batch_size)[rank::world]
    if chunks:
        parts = [(chunk, derive_seed("evaluation", number)) for number, chunk in enumerate(chunks)]
        yield from _load(_Batches(task, split, parts, train=False), workers, device)

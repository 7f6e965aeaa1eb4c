"""Tasks over sequences of tokens: a prediction at chosen positions, or one class for the whole sequence.

Axis letters: B batch, N tokens of a sequence, V vocabulary, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import OptionError
from ...schema import Seed, Size
from ..base import Batch, Forward, Task
from .preprocessing import Ids, pad_right

# Target of a position that neither loss nor accuracy is taken at; PyTorch's own default for cross entropy.
IGNORE = -100

# RandomState's stream is frozen by NumPy's compatibility policy, so generated data stay what they are.
RandomState = np.random.RandomState
Arrays = tuple[np.ndarray, np.ndarray]

_SPLITS = ("train", "val", "test")


def check_at_least(value: int, low: int, *, key: str, why: str = "") -> int:
    """A number that is at least `low`.

    Raises:
        ConfigError: a smaller one.
    """
    if value < low:
        raise OptionError(key, f"{value!r} is too small; at least {low} is needed{f', {why}' if why else ''}.")
    return value


def hash_arrays(splits: Mapping[str, Arrays]) -> str:
    """SHA-256 (hex) over the splits' names and the shapes, dtypes and contents of their arrays."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        for array in splits[split]:
            digest.update(f"{split}{array.shape}{array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class SequenceTask(Task):
    """Base of all tasks whose input are token ids `(B, N)` int64.

    A subclass sets `vocab_size` and `sequence_length` (the longest N) at the latest in `open`. A batch may hold
    `"mask"` (B, N) bool, True for real tokens, and `"document_ids"` (B, N) int64; both are given to the model.
    """

    unit: ClassVar[str] = "tokens"
    objective: ClassVar[str]

    vocab_size: int
    sequence_length: int

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "sequence_length": self.sequence_length,
            "objective": self.objective,
        }

    def preprocessing(self) -> Ids:
        """Ids as they are, unless a subclass knows what they stand for."""
        return Ids(self.vocab_size)

    def example(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        return (torch.zeros(batch_size, self.sequence_length, dtype=torch.int64),)

    def count(self, batch: Batch) -> int:
        return batch["input"].numel()

    def run(self, model: Forward, batch: Batch) -> Tensor:
        """The model's output in float32."""
        return model(batch["input"], **{k: batch[k] for k in ("mask", "document_ids") if k in batch}).float()


class TokenPrediction(SequenceTask):
    """Predict a token at every position whose target is not `IGNORE`; loss and accuracy are taken there only.

    The logits at position t are held against the target at position t; a task of next tokens gives shifted targets.
    `loss` (nats) and `accuracy` are means over all such positions of a split, whichever batches they came in.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    objective: ClassVar[str] = "causal_lm"

    def _chosen(self, model: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["target"] != IGNORE
        return self.run(model, batch)[keep], batch["target"][keep]

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        logits, target = self._chosen(model, batch)
        return F.cross_entropy(logits, target, reduction="sum") / max(1, target.numel())

    def targets(self, batch: Batch) -> Tensor:
        return (batch["target"] != IGNORE).sum()

    def metrics(self) -> dict[str, Any]:
        from torchmetrics import MeanMetric

        return {"loss": MeanMetric(), "accuracy": MeanMetric()}

    def update(self, metrics: Mapping[str, Any], model: Forward, batch: Batch) -> None:
        logits, target = self._chosen(model, batch)
        if target.numel() == 0:
            return
        metrics["loss"].update(F.cross_entropy(logits, target, reduction="none"))
        metrics["accuracy"].update((logits.argmax(-1) == target).float())


class SequenceClassification(SequenceTask):
    """One of K classes for a sequence; accuracy, a share in [0, 1], is the primary metric.

    Padding stands on the right. With a mask the model is told which tokens are real, and a batch is cut to its longest
    sequence; without one every sequence has `sequence_length` tokens and the model has to learn what padding is.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    objective: ClassVar[str] = "classify"

    classes: list[str]

    def model_kwargs(self) -> dict[str, Any]:
        return {**super().model_kwargs(), "num_classes": len(self.classes)}

    def pad(self, rows: list[np.ndarray], *, padding: int, masked: bool) -> dict[str, Tensor]:
        """Sequences of ids as `"input"` and, where `masked`, `"mask"`."""
        return pad_right(rows, length=self.sequence_length, padding=padding, masked=masked)

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        return F.cross_entropy(self.run(model, batch), batch["target"])

    def metrics(self) -> dict[str, Any]:
        from torchmetrics import MeanMetric

        return {"loss": MeanMetric(), "accuracy": MeanMetric()}

    def update(self, metrics: Mapping[str, Any], model: Forward, batch: Batch) -> None:
        logits, target = self.run(model, batch), batch["target"]
        metrics["loss"].update(F.cross_entropy(logits, target, reduction="none"))
        metrics["accuracy"].update((logits.argmax(-1) == target).float())


class SetOptions(TypedDict, total=False):
    """What all synthetic tasks take; see `Generated`."""

    num_train: Size
    num_eval: Size
    seed: Seed


class Generated(TokenPrediction):
    """Base of the synthetic tasks: sequences made by `generate`, a fixed set per split that `seed` decides.

    Every split has its own stream of random numbers; no global generator is read or written.

    Args:
        num_train: sequences for training.
        num_eval: sequences for validation, and as many for testing.
        seed: of the data; the run's own `seed` changes neither.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return {"num_train": 40, "num_eval": 12}

    def __init__(self, *, num_train: Size = 50_000, num_eval: Size = 2_000, seed: Seed = 0) -> None:
        self.num_train = num_train
        self.num_eval = num_eval
        self.seed = seed
        self._data: dict[str, Arrays] = {}

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        """Make `count` sequences: ids (count, N) and targets (count, N) with `IGNORE` where none is asked."""
        raise NotImplementedError

    def open(self) -> None:
        for number, split in enumerate(_SPLITS):
            if split not in self._data:
                ids, target = self.generate(split, self.size(split), RandomState([self.seed, number]))
                self._data[split] = (ids.astype(np.int32), target.astype(np.int32))

    def size(self, split: str) -> int:
        return self.num_train if split == "train" else self.num_eval

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        ids, target = (torch.from_numpy(a[index.numpy()].astype(np.int64)) for a in self._data[split])
        return {"input": ids, "target": target, "index": index}

    def fingerprint(self) -> str:
        return hash_arrays(self._data)


def distinct(rng: np.random.RandomState, rows: int, size: int, high: int) -> np.ndarray:
    """`size` different integers of [0, high) in random order for every row, (rows, size) int64.

    Floyd's sampling, all rows at once: `size` draws per row however large `high` is.
    """
    chosen = np.empty((rows, size), np.int64)
    for column, top in enumerate(range(high - size, high)):
        draw = rng.randint(0, top + 1, rows)
        taken = (chosen[:, :column] == draw[:, None]).any(1)
        chosen[:, column] = np.where(taken, top, draw)
    return np.take_along_axis(chosen, rng.random_sample((rows, size)).argsort(1), 1)


def weighted(rng: np.random.RandomState, rows: int, size: int, weights: np.ndarray) -> np.ndarray:
    """`size` different indices for every row, (rows, size): drawn one after another in proportion to `weights`.

    Exponential races: the order in which independent clocks of these rates ring is the order of such draws.
    """
    found = np.empty((rows, size), np.int64)
    step = max(1, 2**22 // len(weights))  # 32 MB of clocks at a time
    for start in range(0, rows, step):
        part = found[start : start + step]
        clocks = rng.standard_exponential((len(part), len(weights))) / weights
        part[:] = clocks.argsort(1)[:, :size]
    return found

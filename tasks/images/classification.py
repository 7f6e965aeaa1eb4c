"""Classification of images: objective, metrics and the augmentation that mixes samples of a batch.

Axis letters: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...schema import Between, Fraction, Probability
from ..base import Batch, Forward, Task

# A table of K x K counts in a summary is read by people up to about this size.
MAX_CONFUSION = 100


class MixOptions(TypedDict, total=False):
    """What all tasks of images and classes take; see `ImageClassification`."""

    label_smoothing: Probability
    mixup: Annotated[float, Between(0, 100)]
    cutmix: Annotated[float, Between(0, 100)]
    mix_prob: Fraction


class ImageClassification(Task):
    """Images `(B, C, H, W)` to one of K classes; top-1 accuracy in [0, 1] is the primary metric.

    A subclass sets `classes` (names, K of them), `in_chans` and `image_size` (H, W) at the latest in `open`.

    Args:
        label_smoothing: mass of the target spread over all classes, in [0, 1).
        mixup: alpha of mixup (arXiv:1710.09412); 0 for none.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 for none. With both, one is chosen per batch.
        mix_prob: probability that a batch is mixed.
    """

    metric: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "images"

    classes: list[str]
    in_chans: int
    image_size: tuple[int, int]

    def __init__(
        self,
        *,
        label_smoothing: Probability = 0.0,
        mixup: Annotated[float, Between(0, 100)] = 0.0,
        cutmix: Annotated[float, Between(0, 100)] = 0.0,
        mix_prob: Fraction = 1.0,
    ) -> None:
        self.label_smoothing = label_smoothing
        self.mixup, self.cutmix = mixup, cutmix
        self.mix_prob = mix_prob

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_classes": len(self.classes), "in_chans": self.in_chans, "image_size": list(self.image_size)}

    def example(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        return (torch.zeros(batch_size, self.in_chans, *self.image_size),)

    def check_output(self, output: Tensor) -> None:
        """Logits (B, K)."""
        if tuple(output.shape[1:]) != (len(self.classes),):
            raise ConfigError(
                f'model.head: the task "{self.name}" needs a value for every class, (batch, {len(self.classes)}), and '
                f"the model gives {tuple(output.shape)}; use head=linear."
            )

    @functools.cached_property
    def _mixer(self) -> Any:
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mix_prob,
            label_smoothing=self.label_smoothing,
            num_classes=len(self.classes),
        )

    def check_batch(self, size: int) -> None:
        if (self.mixup or self.cutmix) and size % 2:
            raise ConfigError(
                f"train.batch_size: task.mixup and task.cutmix mix pairs, so a part of the batch, divided by processes "
                f"and train.accumulate, must be even; it has {size} images."
            )

    def augment(self, batch: Batch) -> Batch:
        if not (self.mixup or self.cutmix):
            return batch
        self.check_batch(len(batch["input"]))
        mixed, target = self._mixer(batch["input"].clone(), batch["target"])
        return {**batch, "input": mixed, "target": target}

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        target = batch["target"]
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0  # mixed targets are smoothed already
        return F.cross_entropy(model(batch["input"]).float(), target, label_smoothing=smoothing)

    def metrics(self) -> dict[str, Any]:
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        classes = len(self.classes)
        found: dict[str, Any] = {"loss": MeanMetric()}
        for k in (1, 5):
            if k < classes:
                found[f"top{k}"] = MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False)
        if classes == 1:
            found["top1"] = MulticlassAccuracy(1, average="micro", validate_args=False)
        if 1 < classes <= MAX_CONFUSION:
            found["confusion"] = MulticlassConfusionMatrix(classes, validate_args=False)
        return found

    def update(self, metrics: Mapping[str, Any], model: Forward, batch: Batch) -> None:
        logits, target = model(batch["input"]).float(), batch["target"]
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(F.cross_entropy(logits, target, reduction="none"))
            else:
                metric.update(logits, target)

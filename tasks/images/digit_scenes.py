"""Scenes made of scikit-learn's digits, for dense prediction and video; of two images, what changed between them.

Training, validation and test scenes hold different handwritten digits, those of the task `digits`. Every scene is a
function of its split and number, so data are the same in every run and need no download.

Axis letters: N scenes of a split, B batch, D digits of a scene, T frames, S side of the canvas, P side of a digit (8).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...schema import Between, Count, Size
from ..base import Batch, Forward, Task
from ..sequence.sequence import check_at_least
from .memory import Digits
from .preprocessing import Clip

_SPLITS = {"train": 0, "val": 1, "test": 2}
SIDE = 8  # of scikit-learn's digits
_INK = 0.25  # darker pixels of a digit belong to it


@functools.cache
def digit_images(split: str) -> Tensor:
    """The digits of a split of the task `digits`, `(count, P, P)` float32 between 0 and 1."""
    return torch.from_numpy(Digits().load()[split][0].astype(np.float32) / 255)


def draw(digits: Tensor, places: Tensor, side: int) -> Tensor:
    """Digits on canvases; where they overlap the darker pixel is seen.

    Args:
        digits: (B, D, T, P, P), what to draw; zeros draw nothing.
        places: (B, D, T, 2), row and column of the upper left corner, int64; 0 to S - P.
        side: S.

    Returns:
        (B, T, S, S).
    """
    batch, count, frames = places.shape[:3]
    canvas = digits.new_zeros(batch, frames, side, side)
    step = torch.arange(SIDE)
    image, frame = torch.arange(batch)[:, None, None, None], torch.arange(frames)[:, None, None]
    for d in range(count):
        rows, columns = (places[:, d, :, axis, None] + step for axis in (0, 1))
        at = (image, frame, rows[..., :, None], columns[..., None, :])
        canvas[at] = torch.maximum(canvas[at], digits[:, d])
    return canvas


class SceneOptions(TypedDict, total=False):
    """What all tasks on scenes take with the same defaults; see `DigitScenes`."""

    num_train: Size
    num_eval: Size


class DigitScenes(Task):
    """Base of the tasks on scenes. A subclass gives `describe`, `render` and what a task needs besides.

    Args:
        canvas: side S of the images, in pixels.
        num_digits: digits D of a scene.
        noise: deviation of the noise that is added to the frames, whose ink is 1.
        num_train, num_eval: scenes for training, and for validation and test each.
        frames: T, frames of the clip that a model sees.
    """

    unit: ClassVar[str] = "clips"

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return {"num_train": 24, "num_eval": 8}

    def __init__(
        self,
        *,
        canvas: int,
        num_digits: int,
        noise: float,
        frames: int,
        least: int,
        num_train: Size = 4000,
        num_eval: Size = 500,
    ) -> None:
        check_at_least(canvas, least, key="canvas")
        self.canvas, self.num_digits, self.noise, self.frames = canvas, num_digits, noise, frames
        self.counts = {"train": num_train, "val": num_eval, "test": num_eval}
        self.scenes: dict[str, dict[str, Tensor]] = {}

    def describe(self, count: int, digits: int, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        """The scenes of a split: arrays whose first axis is `count`, from `digits` images of digits."""
        raise NotImplementedError

    def render(self, scenes: dict[str, Tensor], digits: Tensor) -> tuple[Tensor, Tensor]:
        """Clips (B, T, S, S) without noise and their targets, from descriptions of scenes and images of digits."""
        raise NotImplementedError

    def open(self) -> None:
        if self.scenes:
            return
        for split, number in _SPLITS.items():
            # RandomState's stream is frozen by NumPy's compatibility policy, so the scenes stay what they are
            made = self.describe(self.counts[split], len(digit_images(split)), np.random.RandomState(number))
            self.scenes[split] = {key: torch.from_numpy(value) for key, value in made.items()}

    def size(self, split: str) -> int:
        return self.counts[split]

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        clips, target = self.render({k: v[index] for k, v in self.scenes[split].items()}, digit_images(split))
        if self.noise:
            shape = clips.shape[1:]
            seeds = (index * len(_SPLITS) + _SPLITS[split]).tolist()
            clips = clips + self.noise * torch.stack(
                [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            )
        return {"input": clips[:, None], "target": target, "index": index}

    def preprocessing(self) -> Clip:
        return Clip(self.frames, self.canvas)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split in _SPLITS:
            digest.update(digit_images(split).numpy().tobytes())
            for key, value in sorted(self.scenes[split].items()):
                digest.update(f"{split}/{key}{tuple(value.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def model_kwargs(self) -> dict[str, Any]:
        """One output per pixel of a frame, unless a subclass says otherwise."""
        size = [self.canvas, self.canvas]
        return {"num_classes": 1, "in_chans": 1, "image_size": size, "frames": self.frames}

    def example(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        return (torch.zeros(batch_size, 1, self.frames, self.canvas, self.canvas),)

    def check_output(self, output: Tensor) -> None:
        """A map for every pixel, unless a subclass says otherwise."""
        if output.ndim != 4 or tuple(output.shape[1:]) != (1, self.canvas, self.canvas):
            raise ConfigError(
                f'model.head: the task "{self.name}" needs a value for every pixel, (batch, 1, {self.canvas}, '
                f"{self.canvas}), and the model gives {tuple(output.shape)}; use head=upsample."
            )

    def maps(self, model: Forward, batch: Batch) -> Tensor:
        """The model's outputs (B, S, S).

        Raises:
            ConfigError: a model without a head for dense prediction.
        """
        output = model(batch["input"])
        self.check_output(output)
        return output.squeeze(1).float()


class ChangeDigits(DigitScenes, name="change_digits"):
    """Two images of one scene, and which pixels belong to a digit that changed between them.

    Of the digits of the first image some are moved, removed or replaced in the second. The rest stay, but the second
    image as a whole is displaced by up to `shift` pixels, as two pictures of one place are, so that the difference of
    the images shows edges of all digits. The input is a clip `(B, 1, 2, S, S)`, the target `(B, S, S)` bool: pixels of
    a changed digit in either image. A model gives a logit for every pixel, `(B, 1, S, S)`.

    The primary metric is the intersection over union of the changed pixels of all images; "f1" stands beside it.

    Args:
        canvas: side S of the images; digits stand apart, in cells of 8 pixels and room for the shift.
        num_digits: digits of the first image.
        change: probability that a digit changes.
        shift: largest displacement of the second image, in pixels and each direction.
        noise, sets: see `DigitScenes`.

    Raises:
        ConfigError: a canvas without a free cell, or values out of range.
    """

    metric: ClassVar[str] = "iou"
    unit: ClassVar[str] = "pairs"

    def __init__(
        self,
        *,
        canvas: Size = 32,
        num_digits: Size = 5,
        change: Annotated[float, Between(0, 1, above=True, below=True)] = 0.4,
        shift: Count = 1,
        noise: Annotated[float, Between(0, 10)] = 0.1,
        **sets: Unpack[SceneOptions],
    ) -> None:
        super().__init__(canvas=canvas, num_digits=num_digits, noise=noise, frames=2, least=2 * SIDE, **sets)
        self.cell = SIDE + 2 * shift
        self.columns = canvas // self.cell
        if num_digits >= self.columns**2:
            raise OptionError(
                "num_digits",
                f"{num_digits} of them with shift={shift} need more than the {self.columns**2} cells "
                f"of {self.cell} pixels that a canvas of {canvas} has.",
            )
        self.change, self.shift = change, shift

    def describe(self, count: int, digits: int, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        total, cells = self.num_digits, self.columns**2
        order = rng.rand(count, cells).argsort(1)[:, : total + 1]
        # "moved" goes to the last of the chosen cells, which is free, so at most one digit of a scene moves
        kind = np.where(rng.rand(count, total) < self.change, rng.randint(1, 4, (count, total)), 0)
        first_move = (kind == 1).argmax(1)
        kind = np.where((kind == 1) & (np.arange(total) != first_move[:, None]), 2, kind)
        after = np.where(kind == 1, order[:, total:], order[:, :total])
        before_digit = rng.randint(0, digits, (count, total))
        other = (before_digit + rng.randint(1, digits, (count, total))) % digits
        return {
            "digit": np.stack([before_digit, np.where(kind == 3, other, before_digit)], 2),
            "cell": np.stack([order[:, :total], after], 2),
            "kind": kind,  # 0 stays, 1 moved, 2 removed, 3 replaced
            "shift": rng.randint(-self.shift, self.shift + 1, (count, 2)),
        }

    def render(self, scenes: dict[str, Tensor], digits: Tensor) -> tuple[Tensor, Tensor]:
        cell, kind = scenes["cell"], scenes["kind"]  # (B, D, 2), (B, D)
        margin = (self.canvas - self.columns * self.cell) // 2 + self.shift
        places = torch.stack([cell // self.columns, cell % self.columns], -1) * self.cell + margin
        places[:, :, 1] += scenes["shift"][:, None]
        shown = digits[scenes["digit"]]  # (B, D, 2, P, P)
        shown[:, :, 1] *= (kind != 2)[..., None, None]
        ink = ((shown > _INK) & (kind > 0)[..., None, None, None]).float()
        return draw(shown, places, self.canvas), draw(ink, places, self.canvas).amax(1) > 0

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.maps(model, batch), batch["target"].float())

    def metrics(self) -> dict[str, Any]:
        from torchmetrics import MeanMetric
        from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

        return {
            "loss": MeanMetric(),
            "iou": BinaryJaccardIndex(validate_args=False),
            "f1": BinaryF1Score(validate_args=False),
        }

    def update(self, metrics: Mapping[str, Any], model: Forward, batch: Batch) -> None:
        logits, target = self.maps(model, batch), batch["target"]
        metrics["loss"].update(F.binary_cross_entropy_with_logits(logits, target.float()), weight=len(logits))
        for name in ("iou", "f1"):
            metrics[name].update(logits.sigmoid(), target)

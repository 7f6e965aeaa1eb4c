"""Clips of moving digits: how they move, and the frame between two others.

Axis letters: N scenes of a split, B batch, D digits of a scene, T frames, S side of the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...schema import Between, Probability, Size
from ..base import Batch, Forward
from ..sequence.sequence import check_at_least
from .classification import ImageClassification
from .digit_scenes import SIDE, DigitScenes, SceneOptions, draw

# (row, column) per frame of unit speed; what circles turns about the middle of the canvas
_DIRECTIONS = {"still": (0, 0), "right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
_TURNS = {"clockwise": 1, "anticlockwise": -1}


class _Motion(DigitScenes):
    """Digits that move all alike: along an axis by `speed` pixels per frame, on a circle, or not at all."""

    can_rest = True

    def __init__(
        self,
        *,
        canvas: int,
        num_digits: int,
        speed: int,
        noise: float,
        frames: int,
        moments: int,
        **sets: Unpack[SceneOptions],
    ) -> None:
        self.speed, self.moments = speed, moments
        least = SIDE + speed * (moments - 1) + 1
        super().__init__(canvas=canvas, num_digits=num_digits, noise=noise, frames=frames, least=least, **sets)

    def describe(self, count: int, digits: int, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        room, shape = self.canvas - SIDE, (count, self.num_digits)
        motion = rng.randint(0 if self.can_rest else 1, len(_DIRECTIONS) + len(_TURNS), count)
        speed = rng.randint(1, self.speed + 1, count)
        moment = np.arange(self.moments)
        velocity = np.array([*_DIRECTIONS.values(), *[(0, 0)] * len(_TURNS)])[motion] * speed[:, None]
        path = velocity[:, None, None] * moment[:, None]  # (N, 1, T, 2), from where a digit starts
        low, high = np.maximum(0, -path.min(2)), room - np.maximum(0, path.max(2))
        start = low + np.floor(rng.rand(*shape, 2) * (high - low + 1)).astype(np.int64)
        straight = start[:, :, None] + path
        # the same number of pixels per frame along the circle
        radius = rng.uniform(0.5, 1.0, shape) * room / 2
        turn = np.array([0] * len(_DIRECTIONS) + list(_TURNS.values()))[motion]
        begin = rng.uniform(0, 2 * math.pi, shape)
        angle = begin[..., None] + (turn * speed)[:, None, None] * moment / radius[..., None]
        circle = room / 2 + radius[..., None, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
        places = np.where((turn != 0)[:, None, None, None], np.rint(circle).astype(np.int64), straight)
        return {"digit": rng.randint(0, digits, shape), "places": places, "motion": motion}

    def clip(self, scenes: dict[str, Tensor], digits: Tensor) -> Tensor:
        """All moments of the scenes, (B, T, S, S)."""
        shown = digits[scenes["digit"]].unsqueeze(2).expand(-1, -1, self.moments, -1, -1)
        return draw(shown, scenes["places"], self.canvas)


class MovingDigits(_Motion, ImageClassification, name="moving_digits"):
    """Clips of moving digits, and how they move: not at all, in one of four directions, or round one way or the other.

    A single frame says nothing about the class. The input is `(B, 1, T, S, S)`, the metric top-1 accuracy over the
    seven classes.

    Args:
        canvas: side S.
        num_digits: digits of a scene; all move alike.
        frames: T.
        speed: largest speed, in pixels per frame; every clip has a whole number from 1 to it.
        noise, sets: see `DigitScenes`.
        label_smoothing: see `ImageClassification`.

    Raises:
        ConfigError: a canvas that the fastest digit would leave, or values out of range.
    """

    def __init__(
        self,
        *,
        canvas: Size = 24,
        num_digits: Size = 2,
        frames: Size = 6,
        speed: Size = 2,
        noise: Annotated[float, Between(0, 10)] = 0.2,
        label_smoothing: Probability = 0.0,
        **sets: Unpack[SceneOptions],
    ) -> None:
        check_at_least(frames, 2, key="frames")
        _Motion.__init__(
            self,
            canvas=canvas,
            num_digits=num_digits,
            speed=speed,
            noise=noise,
            frames=frames,
            moments=frames,
            **sets,
        )
        ImageClassification.__init__(self, label_smoothing=label_smoothing)
        self.classes = [*_DIRECTIONS, *_TURNS]

    def render(self, scenes: dict[str, Tensor], digits: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip(scenes, digits), scenes["motion"]

    def labels(self, split: str) -> Tensor:
        return self.scenes[split]["motion"]

    def model_kwargs(self) -> dict[str, Any]:
        return {**super().model_kwargs(), "num_classes": len(self.classes)}

    def check_output(self, output: Tensor) -> None:
        ImageClassification.check_output(self, output)


class MiddleFrame(_Motion, name="moving_digits_middle"):
    """Two frames of moving digits, and the frame between them: video frame interpolation.

    The input is `(B, 1, 2, S, S)`, the target `(B, S, S)` with values from 0 to 1; a model gives `(B, 1, S, S)`. The
    motions are those of `MovingDigits` but for digits at rest. The metric is the peak signal-to-noise ratio in dB,
    averaged over clips; "mean" is that of the mean of the two frames, to compare. The loss is the mean squared error:
    most pixels are empty, and the absolute error would be content with an empty frame.

    Args:
        canvas, num_digits, speed: as of `MovingDigits`; the two given frames are twice the speed apart.
        noise, sets: see `DigitScenes`; only what is given is noisy.
    """

    metric: ClassVar[str] = "psnr"
    can_rest = False  # nothing would be asked, and its ratio is infinite

    def __init__(
        self,
        *,
        canvas: Size = 24,
        num_digits: Size = 2,
        speed: Size = 3,
        noise: Annotated[float, Between(0, 10)] = 0.0,
        **sets: Unpack[SceneOptions],
    ) -> None:
        super().__init__(canvas=canvas, num_digits=num_digits, speed=speed, noise=noise, frames=2, moments=3, **sets)

    def render(self, scenes: dict[str, Tensor], digits: Tensor) -> tuple[Tensor, Tensor]:
        first, middle, last = self.clip(scenes, digits).unbind(1)
        return torch.stack([first, last], 1), middle

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        return F.mse_loss(self.maps(model, batch), batch["target"])

    def metrics(self) -> dict[str, Any]:
        from torchmetrics import MeanMetric

        return {"loss": MeanMetric(), "psnr": MeanMetric(), "mean": MeanMetric()}

    def update(self, metrics: Mapping[str, Any], model: Forward, batch: Batch) -> None:
        output, target = self.maps(model, batch), batch["target"]
        metrics["loss"].update((output - target).square().mean((1, 2)))
        for name, image in (("psnr", output.clamp(0, 1)), ("mean", batch["input"].mean((1, 2)).clamp(0, 1))):
            error = (image - target).square().mean((1, 2)).clamp_min(1e-10)
            metrics[name].update(-10 * error.log10())

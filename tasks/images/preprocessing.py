"""Images and clips as the image tasks evaluate them.

Axis letters: B batch, C channels, T frames, H height, W width, S side of a square.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ..preprocessing import Preprocessing


def as_rgb(image: Any) -> Any:
    """A picture in Pillow's mode RGB, of a path, an open file, Pillow's own, or an array (H, W) or (H, W, C) of bytes.

    Raises:
        ConfigError: nothing that can be read as an image.
    """
    from PIL import Image

    from .decode import UNREADABLE, read_image, to_rgb

    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if isinstance(image, (np.ndarray, Tensor)):
            return to_rgb(Image.fromarray(_bytes(image).squeeze(-1) if image.shape[-1] == 1 else _bytes(image)))
        return read_image(str(image) if isinstance(image, Path) else image)
    except (*UNREADABLE, TypeError, AttributeError) as error:
        raise ConfigError(f"image: {image!r:.80} cannot be read as an image ({error}).") from error


def _bytes(image: Any) -> np.ndarray:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ConfigError(f"image: an array must be (H, W) or (H, W, C) of uint8, not {array.shape} of {array.dtype}.")
    return array


@dataclass(frozen=True)
class NormalisedImage(Preprocessing, name="normalised"):
    """An image normalised channel by channel and, where it is of another size, resized; no cropping.

    Attributes:
        mean, std: of the training images, of values from 0 to 255, one for each channel; one channel is grey.
        image_size: H, W.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]

    def normalise(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) float32 with values from 0 to 255, which are changed in place, to what a model sees."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        x = x.sub_(mean).div_(std)
        if x.shape[2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=True)
        return x

    def __call__(self, sample: Any) -> Tensor:
        """(C, H, W) float32, of a path, a Pillow image, or an array (H, W) or (H, W, C) of bytes."""
        channels = len(self.mean)
        if isinstance(sample, (np.ndarray, Tensor)) and (1 if sample.ndim == 2 else sample.shape[-1]) == channels:
            array = _bytes(sample)
        else:
            image = as_rgb(sample)
            array = np.array(image.convert("L") if channels == 1 else image)
        x = torch.from_numpy(np.array(array))
        x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
        return self.normalise(x[None].float())[0]


@dataclass(frozen=True)
class TimmImage(Preprocessing, name="timm"):
    """timm's transform of evaluation: resize, crop the middle, normalise. RGB.

    Attributes:
        image_size: S.
        crop_pct: part of the resized image's side that is kept.
        interpolation: of the resizing.
        mean, std: of values from 0 to 1.
    """

    image_size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @functools.cached_property
    def transform(self) -> Any:
        """From an RGB image of Pillow to (3, S, S)."""
        from timm.data import create_transform

        return create_transform(
            input_size=(3, self.image_size, self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )

    def __call__(self, sample: Any) -> Tensor:
        """(3, S, S) float32, of a path, a Pillow image, or an array (H, W) or (H, W, C) of bytes."""
        return self.transform(as_rgb(sample))


@dataclass(frozen=True)
class Clip(Preprocessing, name="clip"):
    """Frames of grey images, from 0 to 1, of a fixed size.

    Attributes:
        frames: T.
        canvas: S.
    """

    frames: int
    canvas: int

    def __call__(self, sample: Any) -> Tensor:
        """(1, T, S, S) float32, of an array (T, S, S) of bytes, or of floats from 0 to 1."""
        x = torch.as_tensor(np.asarray(sample))
        if tuple(x.shape) != (self.frames, self.canvas, self.canvas):
            raise ConfigError(
                f"clip: {tuple(x.shape)} is not ({self.frames}, {self.canvas}, {self.canvas}): frames, height, width."
            )
        return (x.float() / 255 if x.dtype == torch.uint8 else x.float())[None]

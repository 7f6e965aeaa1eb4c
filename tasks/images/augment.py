"""Augmentation of whole batches of small images, as tensor operations.

Axis letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@contextlib.contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's global generators from `generator`; put them back afterwards.

    For libraries that draw from the global generators: what they draw becomes a function of the batch.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator))
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def random_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad `(B, C, H, W)` by `padding` zeros on each side and cut an H x W window at a random place, per image."""
    if padding == 0:
        return x
    batch, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = (torch.randint(2 * padding + 1, (batch, 1), generator=generator) for _ in range(2))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    image = torch.arange(batch)
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of `(B, C, H, W)` left to right with probability 1/2."""
    flip = torch.rand(x.shape[0], generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


def random_erase(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Set a random box of each image to zero with the given probability (arXiv:1708.04896).

    The box has 2% to a third of the area and an aspect ratio of 0.3 to 3.3, as published.
    """
    batch, _, height, width = x.shape
    u = torch.rand(5, batch, generator=generator)
    area = (0.02 + u[0] * (1 / 3 - 0.02)) * height * width
    ratio = torch.exp((2 * u[1] - 1) * 1.2)
    box_height = (area * ratio).sqrt().round().clamp(1, height)
    box_width = (area / ratio).sqrt().round().clamp(1, width)
    top = (u[2] * (height - box_height + 1)).floor()
    left = (u[3] * (width - box_width + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
    box = in_rows[:, :, None] & in_columns[:, None, :] & (u[4] < probability)[:, None, None]
    return x.masked_fill(box[:, None], 0.0)


def rand_augment(images: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """timm's RandAugment (arXiv:1909.13719) on `(B, C, H, W)` uint8 with C 1 or 3; one image at a time, so slow.

    Args:
        images: the batch.
        policy: timm's notation, e.g. `rand-m9-mstd0.5-inc1`.
        generator: source of randomness.
    """
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    transform = rand_augment_transform(
        policy, {"translate_const": max(1, images.shape[-1] // 4), "img_mean": (0, 0, 0)}
    )
    done = []
    with seeded(generator):
        for image in images.permute(0, 2, 3, 1).numpy():
            colour = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
            array = np.array(transform(Image.fromarray(colour)))
            done.append(array.mean(2, keepdims=True).round().astype(np.uint8) if image.shape[2] == 1 else array)
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)

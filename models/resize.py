"""Models for another image size: what depends on the grid is interpolated."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigError
from .backbones.isotropic import Isotropic
from .backbones.vision import VisionBackbone, check_image_size


@torch.no_grad()
def resize_grid(model: nn.Module, image_size: int | tuple[int, int] | list[int]) -> nn.Module:
    """Change the image size that a vision model's parameters are made for, in place, by interpolation.

    Each mixer resizes itself (`Mixer.resize_grid`); a learned position table is resized bicubically. Models without
    such parameters take any size and only remember the new one.

    Args:
        model: a vision model.
        image_size: one number or (height, width).

    Returns:
        The same model.

    Raises:
        ConfigError: not a vision model, a size that the stem cannot take, or a mixer that cannot be resized.
    """
    if not isinstance(model, VisionBackbone):
        raise ConfigError(f"resize_grid: {type(model).__name__} is not a vision model with a grid.")
    height, width = check_image_size(image_size, key="image_size")
    for mixer, grid in model.mixers_with_grids((height, width)):
        mixer.resize_grid(grid)
    if isinstance(model, Isotropic):
        grid = model.grid_of((height, width))
        position = model.resized_position(grid)
        if position is not model.position and position is not None:
            model.position = nn.Parameter(position)
        model.grid = grid
    size = height if height == width else [height, width]
    model.config.image_size = size
    if isinstance(getattr(model, "model_config", None), dict):
        model.model_config["image_size"] = size  # type: ignore[index]
    return model

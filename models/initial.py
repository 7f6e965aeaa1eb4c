"""Initial values of a whole model, again: after `to_empty`, or to start over."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .registry import build_model, config_of


@torch.no_grad()
def init_weights(model: nn.Module, *, keep: Callable[[str, Tensor], bool] | None = None) -> nn.Module:
    """Give a model of `create_model` the values of a fresh one, parameters and buffers, in place.

        with torch.device("meta"):
            model = create_model("mamba2_1.3b")
        model.to_empty(device="cuda")
        init_weights(model)

    The values come from a second model that is built on the CPU, so they are by construction those that a fresh model
    has, whatever its parts are; they take the memory of that model for a moment.

    Args:
        model: as `create_model` made it; its classifier may have been reset and its grid resized.
        keep: `keep(name, tensor)`, whether a parameter or buffer stays as it is; by default none does.

    Returns:
        The same model.

    Raises:
        ConfigError: a model without a configuration.
    """
    with torch.device("cpu"):
        fresh = build_model(copy.deepcopy(config_of(model)))
    values = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()  # `to_empty` has made two tensors of one
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in values and not (keep is not None and keep(name, tensor)):
            tensor.copy_(values[name])
    return model

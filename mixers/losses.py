"""Auxiliary losses: how a part in the middle of a model adds to the objective, by name.

    with collect_losses() as losses:
        loss = task.loss(model, batch)
    loss = loss + sum(weights.get(name, 1.0) * value for name, value in losses.items())

A part calls `aux_loss("balance", value)` in its forward. It need not know who collects, or whether anybody does.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from torch import Tensor

from ..errors import ConfigError


class Losses(Mapping[str, Tensor]):
    """What was collected: the sum of the values of each name, as in a model each layer adds one."""

    def __init__(self) -> None:
        self.values_of: dict[str, list[Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        first, *rest = self.values_of[name]
        return sum(rest, first)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


_COLLECTING: contextvars.ContextVar[dict[str, list[Tensor]] | None] = contextvars.ContextVar(
    "mixerzoo_losses", default=None
)


def aux_loss(name: str, value: Tensor) -> None:
    """Add a loss to what the trainer minimises. Outside of `collect_losses` it does nothing.

    Args:
        name: under which it is weighted (`train.aux_losses`) and logged; several parts may share one.
        value: a scalar, a mean over tokens or samples as the loss of a task is; it keeps its gradient.

    Raises:
        ConfigError: not a scalar.
    """
    if value.ndim:
        raise ConfigError(f'aux_loss("{name}"): a scalar is needed, not a tensor of shape {tuple(value.shape)}.')
    collected = _COLLECTING.get()
    if collected is not None:
        collected.setdefault(name, []).append(value)


@contextlib.contextmanager
def collect_losses() -> Iterator[Losses]:
    """Collect what `aux_loss` gets inside of the block. Of nested blocks the inner one collects.

    The backward pass belongs behind the block: layers that are recomputed there do not count twice.
    """
    losses = Losses()
    token = _COLLECTING.set(losses.values_of)
    try:
        yield losses
    finally:
        _COLLECTING.reset(token)

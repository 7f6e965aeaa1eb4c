"""What a token mixer costs over the number of tokens: counted, not timed.

Axis letters: B batch, N tokens, C channels, H height, W width, T frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...mixers import Grid, create_mixer
from ...mixers.base import Mixer
from ...mixers.registry import mixer_class, mixer_options
from ...mixers.state import state_bytes
from ...training.cost import count_parameters, measure_activation_bytes, measure_flops

DIM = 64
SIDES = (8, 16, 32, 64)  # of square grids; sequences have as many tokens


@dataclass(frozen=True)
class Cost:
    """Costs of one forward pass of one sample.

    Attributes:
        grid: of the tokens.
        parameters: of the mixer made for this grid.
        flops: 2 for a multiply-add.
        kept: bytes for the backward pass, in float32.
        state: bytes of the decoding state after all tokens; None where it does not stream.
    """

    grid: Grid
    parameters: int
    flops: int
    kept: int
    state: int | None

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def grids(cls: type[Mixer]) -> list[Grid]:
    """Sequences where the mixer takes them, else squares, else clips of four frames."""
    sides = SIDES[:-1] if cls.complexity == "N^3" else SIDES
    if 1 in cls.axes:
        return [(side * side,) for side in sides]
    return [(side, side) for side in sides] if 2 in cls.axes else [(4, side // 2, side // 2) for side in sides]


def build(name: str, grid: Grid, dim: int = DIM, **options: Any) -> Mixer:
    """A mixer for this grid, causal where that is possible and the grid is a sequence."""
    cls, tokens = mixer_class(name), math.prod(grid)
    longest = mixer_options(name).get("l_max")  # filters as long as this, and no sequences longer
    if longest is not None and longest.default < tokens:
        options = {"l_max": tokens, **options}
    causal = len(grid) == 1 and cls.causal != "cannot"
    return create_mixer(name, dim, grid=grid if cls.needs_grid else None, causal=causal, **options)


def costs(name: str) -> list[Cost]:
    """A mixer's costs with its default options and 64 channels, over growing grids."""
    cls = mixer_class(name)
    found = []
    for grid in grids(cls):
        torch.manual_seed(0)
        mixer, x = build(name, grid), torch.randn(1, *grid, DIM)
        state = None
        if cls.streams and len(grid) == 1:
            with torch.no_grad():
                state = state_bytes(mixer.prefill(x)[1])
        kept = measure_activation_bytes(mixer, x)
        found.append(Cost(grid, count_parameters(mixer), measure_flops(mixer, x), kept, state))
    return found

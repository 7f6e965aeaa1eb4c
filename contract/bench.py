"""What a token mixer costs beside others, over the number of tokens: time, memory and the state of decoding.

All take turns in one process, so that whatever else the machine does falls on all of them alike.
Axis letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers import Mixer, create_mixer, mixer_class
from ..mixers.state import state_bytes
from ..training.cost import measure_activation_bytes
from .mixers import can_be_causal
from .tools import Grid, tokens

BESIDE = ("identity", "attention", "conv", "mamba2")
WIDTH = 64
SEQUENCES: tuple[Grid, ...] = ((256,), (1024,), (4096,))
SQUARES: tuple[Grid, ...] = ((16, 16), (32, 32), (64, 64))
CLIPS: tuple[Grid, ...] = ((4, 8, 8), (4, 16, 16), (4, 32, 32))
_ROUNDS = 5
_SECONDS = 3.0  # of a pass; a mixer is not tried on more tokens after one that took longer


@dataclass(frozen=True)
class Line:
    """Costs of one mixer on one grid, for one sample.

    Attributes:
        forward, both: median seconds of a forward pass, and of one with its backward pass.
        activations: bytes that are kept for the backward pass.
        state: bytes of the state after so many tokens, None for mixers that do not stream.
    """

    name: str
    grid: Grid
    forward: float
    both: float
    activations: int
    state: int | None


def grids_for(name: str) -> tuple[Grid, ...]:
    """Sequences where the mixer takes them, else images, else clips."""
    axes = mixer_class(name).axes
    return SEQUENCES if 1 in axes else SQUARES if 2 in axes else CLIPS


def measure(name: str, *, beside: Sequence[str] = BESIDE, grids: Sequence[Grid] | None = None) -> list[Line]:
    """Costs of a mixer and of others beside it that take the same grids, grid by grid.

    Args:
        name: of the mixer.
        beside: names of others.
        grids: to measure on; by default three of growing size.
    """
    grids = grids_for(name) if grids is None else grids
    rank = len(grids[0])
    names = [name, *(other for other in beside if other != name and rank in mixer_class(other).axes)]
    lines: list[Line] = []
    slow: set[str] = set()
    for grid in grids:
        here = {n: _built(n, grid) for n in names if n not in slow}
        x = tokens(1, *grid, WIDTH)
        times: dict[str, tuple[list[float], list[float]]] = {n: ([], []) for n in here}
        for n, mixer in here.items():
            if max(_timed(_forward, mixer, x), _timed(_both, mixer, x)) > _SECONDS:
                slow.add(n)
        for turn in range(_ROUNDS):
            order = list(here)[turn % len(here) :] + list(here)[: turn % len(here)]
            for n in order:
                if n in slow and turn:
                    continue
                times[n][0].append(_timed(_forward, here[n], x))
                times[n][1].append(_timed(_both, here[n], x))
        for n, mixer in here.items():
            forward, both = (statistics.median(seconds) for seconds in times[n])
            kept = measure_activation_bytes(mixer, x)
            lines.append(Line(n, grid, forward, both, kept, _state(n, grid)))
    return lines


def _built(name: str, grid: Grid) -> Mixer:
    torch.manual_seed(0)
    return create_mixer(name, WIDTH, grid=grid, causal=mixer_class(name).causal == "always")


def _timed(run: Callable[[Mixer, Tensor], None], mixer: Mixer, x: Tensor) -> float:
    start = time.perf_counter()
    run(mixer, x)
    return time.perf_counter() - start


def _forward(mixer: Mixer, x: Tensor) -> None:
    with torch.no_grad():
        mixer(x)


def _both(mixer: Mixer, x: Tensor) -> None:
    mixer(x.requires_grad_()).square().mean().backward()
    mixer.zero_grad()
    x.grad = None


def _state(name: str, grid: Grid) -> int | None:
    """Bytes of the state after as many tokens as the grid has."""
    if not mixer_class(name).streams or not can_be_causal(name) or len(grid) > 1:
        return None
    mixer = create_mixer(name, WIDTH, grid=grid, causal=True).eval()
    with torch.no_grad():
        return state_bytes(mixer.prefill(tokens(1, *grid, WIDTH))[1])

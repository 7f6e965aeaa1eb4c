"""`spectral_filter` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import spectral_filter


def _inputs(draw: Draw, *, B: int, modes: tuple[int, ...], C: int, adaptive: bool = False) -> dict[str, Any]:
    shape = (*modes, C)
    return {
        "x": draw.normal(B, *shape, dtype=torch.complex64),
        "w": draw.normal(*((B,) if adaptive else ()), *shape, dtype=torch.complex64),
    }


def _flops(backward: bool, *, B: int, modes: tuple[int, ...], C: int, **_: Any) -> Flops:
    return Flops(other=(20 if backward else 6) * B * math.prod(modes) * C)


_PLANE = {"B": 4, "modes": (14, 8), "C": 32}

CASES = [
    Case(
        run=spectral_filter,
        inputs=_inputs,
        like=("x",),
        flops=_flops,
        small={
            "forward": Size(_PLANE, backward=False),
            "backward_shared": Size(_PLANE),  # GFNet: one filter
            "backward_adaptive": Size({**_PLANE, "adaptive": True}),  # AFFNet: a filter for each sample
        },
        odd=(
            {"B": 3, "modes": (7, 5), "C": 13},
            {"B": 2, "modes": (7, 5), "C": 70, "adaptive": True},
            {"B": 1, "modes": (1,), "C": 1},
        ),
        models={"GFNet-B: (64, 14, 8, 512) complex64": {"B": 64, "modes": (14, 8), "C": 512}},
        dtypes=(torch.complex64,),
    )
]

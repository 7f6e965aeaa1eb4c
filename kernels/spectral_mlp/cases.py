"""`spectral_mlp` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import spectral_mlp


def _inputs(
    draw: Draw, *, B: int, modes: tuple[int, ...], C: int, blocks: int, modes_inner: bool = False
) -> dict[str, Any]:
    """`modes_inner`: in memory as a Fourier transform over (H, W) returns it."""
    order = (B, C, *modes) if modes_inner else (B, *modes, C)
    x = draw.normal(*order, dtype=torch.complex64)
    width = C // blocks
    shapes = {"w1": (width, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    weights = {k: 0.1 * draw.normal(2, blocks, *s, dtype=torch.float32) for k, s in shapes.items()}
    return {"x": x.movedim(1, -1) if modes_inner else x} | weights


def _flops(backward: bool, *, B: int, modes: tuple[int, ...], C: int, blocks: int, **_: Any) -> Flops:
    return Flops((3 if backward else 1) * 16 * B * math.prod(modes) * C * (C // blocks))


_PLANE = {"B": 2, "modes": (14, 8), "C": 64, "blocks": 4}

CASES = [
    Case(
        run=spectral_mlp,
        inputs=_inputs,
        like=("x",),
        flops=_flops,
        small={
            "forward": Size(_PLANE, backward=False),
            "forward_32": Size({**_PLANE, "blocks": 2}, backward=False),  # weights stay in registers
            "forward_96": Size(
                {"B": 1, "modes": (14, 8), "C": 192, "blocks": 2}, backward=False
            ),  # AFNO-B: they do not
            "backward": Size(_PLANE),
            "backward_modes_inner": Size({**_PLANE, "modes_inner": True}),
        },
        odd=(
            {"B": 2, "modes": (7, 5), "C": 36, "blocks": 3},
            {"B": 1, "modes": (9, 5), "C": 48, "blocks": 2, "modes_inner": True},
            {"B": 1, "modes": (1,), "C": 3, "blocks": 1},
        ),
        models={"AFNO-B: (8, 64, 33, 768) complex64, 8 blocks": {"B": 8, "modes": (64, 33), "C": 768, "blocks": 8}},
        dtypes=(torch.complex64,),
    )
]

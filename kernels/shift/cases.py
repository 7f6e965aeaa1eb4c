"""`shift` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import shift

_FOUR = ((0, 1), (0, -1), (1, 0), (-1, 0))  # S2-MLP: one pixel in each direction


def _inputs(
    draw: Draw, *, B: int, grid: tuple[int, ...], C: int, shifts: tuple[Any, ...] = _FOUR, padding: str = "zeros"
) -> dict[str, Any]:
    return {"x": draw.normal(B, *grid, C), "shifts": shifts, "padding": padding}


def _flops(backward: bool, **_: Any) -> Flops:
    return Flops()


CASES = [
    Case(
        run=shift,
        inputs=_inputs,
        like=("x",),
        flops=_flops,
        small={
            "zeros": Size({"B": 2, "grid": (14, 14), "C": 64}, torch.float32),
            "wrap": Size({  # MS-MLP: five circular shifts along an axis
                "B": 2, "grid": (14, 14), "C": 80, "shifts": tuple((d, 0) for d in range(-2, 3)), "padding": "wrap",
            }),
            "sequence": Size({"B": 2, "grid": (50,), "C": 64, "shifts": (1, 0)}, torch.float32),
        },
        odd=(
            {"B": 2, "grid": (5, 4), "C": 70, "shifts": ((1, 0), (-2, 3), (7, -7))},
            {"B": 2, "grid": (41,), "C": 7, "shifts": (3, -41, 50), "padding": "wrap"},
            {"B": 1, "grid": (3, 5, 4), "C": 33, "shifts": ((1, 0, 0), (-2, 3, 1), (0, -7, 7))},
        ),
        models={"S2-MLP: (64, 14, 14, 384) bf16": {"B": 64, "grid": (14, 14), "C": 384}},
    )
]  # fmt: skip

"""`token_mlp` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import token_mlp


def _inputs(
    draw: Draw, *, B: int, N: int, E: int, C: int, M: int | None = None, activation: str = "gelu", bias: bool = True
) -> dict[str, Any]:
    return {
        "x": draw.normal(B, N, C),
        "w1": draw.normal(E, N),
        "b1": draw.normal(E) if bias else None,
        "w2": draw.normal(M or N, E),
        "b2": draw.normal(M or N) if bias else None,
        "activation": activation,
    }


def _flops(backward: bool, *, B: int, N: int, E: int, C: int, M: int | None = None, **_: Any) -> Flops:
    return Flops((3 if backward else 1) * 2 * B * (N + (M or N)) * E * C, exponentials=(1 + backward) * B * E * C)


_SMALL = {"B": 2, "N": 49, "E": 96, "C": 64}

CASES = [
    Case(
        run=token_mlp,
        inputs=_inputs,
        like=("x",),
        flops=_flops,
        small={
            "forward": Size(_SMALL, backward=False),
            "backward": Size(_SMALL),
            "backward_float32": Size({**_SMALL, "activation": "silu"}, torch.float32),
        },
        odd=(
            {"B": 2, "N": 37, "E": 50, "C": 70},
            {"B": 1, "N": 1, "E": 3, "C": 5, "M": 2, "bias": False, "activation": "relu"},
            {"B": 3, "N": 49, "E": 100, "C": 33, "M": 17, "activation": "silu"},
        ),
        models={"Mixer-B/16: (64, 196, 768) bf16, 384 hidden": {"B": 64, "N": 196, "E": 384, "C": 768}},
    )
]

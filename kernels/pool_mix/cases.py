"""`pool_mix` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import pool_mix


def _inputs(
    draw: Draw, *, B: int, grid: tuple[int, ...], C: int, pool: int = 3, causal: bool = False, mask: bool = False,
    documents: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "x": draw.normal(B, *grid, C),
        "pool_size": pool,
        "causal": causal,
        "mask": draw.mask(B, *grid) if mask else None,
        "document_ids": draw.documents(B, *grid) if documents else None,
    }


def _flops(backward: bool, *, B: int, grid: tuple[int, ...], C: int, **_: Any) -> Flops:
    return Flops(other=(23 if backward else 11) * B * math.prod(grid) * C)


_PLANE = {"B": 1, "grid": (14, 14), "C": 64}

CASES = [
    Case(
        run=pool_mix,
        inputs=_inputs,
        like=("x",),
        flops=_flops,
        small={
            "forward": Size({"B": 1, "grid": (28, 28), "C": 64}, torch.float32, backward=False),
            "backward": Size(_PLANE, torch.float32),
            "backward_half": Size({**_PLANE, "pool": 5}),
            "backward_masked": Size({**_PLANE, "mask": True}, torch.float32),
            "backward_causal": Size(
                {"B": 1, "grid": (128,), "C": 64, "causal": True, "documents": True}, torch.float32
            ),
            "backward_video": Size({"B": 1, "grid": (4, 8, 8), "C": 32}, torch.float32),
        },
        odd=(
            {"B": 2, "grid": (7, 5), "C": 33, "mask": True},
            {"B": 2, "grid": (63,), "C": 5, "causal": True, "documents": True, "mask": True, "pool": 4},
            {"B": 1, "grid": (3, 5, 9), "C": 33, "pool": 5},
        ),
        models={"PoolFormer-S12 stage 1: (64, 56, 56, 64) bf16": {"B": 64, "grid": (56, 56), "C": 64}},
    )
]

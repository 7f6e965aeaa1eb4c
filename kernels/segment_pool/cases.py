"""`segment_pool` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import segment_pool


def _inputs(
    draw: Draw, *, B: int, L: int, C: int, segment: int = 16, window: int = 3, mask: bool = False
) -> dict[str, Any]:
    return {
        "segment": draw.normal(B, L, C),
        "local": draw.normal(B, L, C),
        "segment_length": segment,
        "window": window,
        "mask": draw.mask(B, L) if mask else None,
    }


def _flops(backward: bool, *, B: int, L: int, C: int, **_: Any) -> Flops:
    return Flops(other=(8 if backward else 3) * B * L * C)  # forward three maxima


_PLAIN = {"B": 2, "L": 100, "C": 64}

CASES = [
    Case(
        run=segment_pool,
        inputs=_inputs,
        like=("segment", "local"),
        flops=_flops,
        small={
            "forward": Size(_PLAIN, torch.float32, backward=False),
            "backward": Size(_PLAIN, torch.float32),
            "backward_masked_half": Size({**_PLAIN, "mask": True}),
        },
        odd=(
            {"B": 2, "L": 63, "C": 70, "segment": 20, "mask": True},
            {"B": 1, "L": 1, "C": 2, "segment": 5},
            {"B": 1, "L": 200, "C": 33, "segment": 7, "window": 5},
        ),
        models={"PoNet-base: (32, 512, 768) bf16": {"B": 32, "L": 512, "C": 768}},
    )
]

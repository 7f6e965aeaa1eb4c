"""`gla` and `gla_step` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import gla, gla_step


def _inputs(
    draw: Draw, *, B: int, L: int, H: int, K: int, V: int, decay: float = 1.0, initial: bool = False,
    documents: bool = False, sequences: bool = False,
) -> dict[str, Any]:  # fmt: skip
    offsets = draw.offsets(L) if sequences else None
    rows = B if offsets is None else len(offsets) - 1
    return {
        "q": draw.normal(B, L, H, K),
        "k": draw.unit(B, L, H, K),
        "v": draw.normal(B, L, H, V),
        "g": -decay * draw.uniform(B, L, H, K),
        "initial_state": draw.normal(rows, H, K, V, dtype=torch.float32) if initial else None,
        "document_ids": draw.documents(B, L) if documents else None,
        "cu_seqlens": offsets,
        "return_final_state": initial,
    }


def _flops(backward: bool, *, B: int, L: int, H: int, K: int, V: int, **_: Any) -> Flops:
    """One read and one write of the state per token, K V multiply-adds each; backward twice that."""
    return Flops((3 if backward else 1) * 2 * B * L * H * K * 2 * V, exponentials=B * L * H * K)


def _step_inputs(draw: Draw, *, B: int, H: int, K: int, V: int) -> dict[str, Any]:
    scan = _inputs(draw, B=B, L=1, H=H, K=K, V=V)
    state = draw.normal(B, H, K, V, dtype=torch.float32)
    return {f"{name}_t": scan[name][:, 0] for name in ("q", "k", "v", "g")} | {"state": state}


def _step_flops(backward: bool, *, B: int, H: int, K: int, V: int) -> Flops:
    return Flops(other=5 * B * H * K * V)


_HEADS = {"B": 1, "L": 512, "H": 4, "K": 64, "V": 64}
_SHORT = {"B": 1, "L": 40, "H": 2, "K": 64, "V": 64}

CASES = [
    Case(
        run=gla,
        inputs=_inputs,
        like=("v",),
        flops=_flops,
        small={
            "forward": Size(_HEADS, backward=False),
            "backward": Size(_HEADS),
            "backward_128": Size({**_SHORT, "B": 2, "K": 128}),  # the last chunk is not full
            "backward_float32": Size(_SHORT, torch.float32),
            "backward_128_float32": Size({**_SHORT, "K": 128}, torch.float32),
            "backward_sequences": Size({"B": 1, "L": 40, "H": 2, "K": 64, "V": 64, "initial": True, "sequences": True}),
        },
        odd=(
            {"B": 2, "L": 37, "H": 2, "K": 24, "V": 9, "initial": True, "documents": True},
            {"B": 1, "L": 1, "H": 1, "K": 16, "V": 5},
            {"B": 1, "L": 200, "H": 2, "K": 128, "V": 72, "decay": 8.0, "initial": True},
            {"B": 1, "L": 37, "H": 2, "K": 24, "V": 9, "initial": True, "sequences": True},
        ),
        models={"GLA 340M: 4 heads, K 128, V 256, 16384 tokens": {"B": 8, "L": 2048, "H": 4, "K": 128, "V": 256}},
    ),
    Case(
        run=gla_step,
        inputs=_step_inputs,
        like=("v_t", "state"),
        flops=_step_flops,
        small={"step": Size({"B": 4, "H": 2, "K": 64, "V": 64})},
        odd=({"B": 2, "H": 4, "K": 5, "V": 70}, {"B": 3, "H": 1, "K": 130, "V": 6}),
        models={"GLA 340M: 64 rows, 4 heads, K 128, V 256": {"B": 64, "H": 4, "K": 128, "V": 256}},
        gradients=False,
    ),
]

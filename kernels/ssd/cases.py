"""`ssd` and `ssd_step` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import ssd, ssd_step


def _inputs(
    draw: Draw, *, B: int, L: int, H: int, K: int, V: int, G: int | None = None, gates: bool = True,
    initial: bool = False, documents: bool = False, sequences: bool = False,
) -> dict[str, Any]:  # fmt: skip
    offsets = draw.offsets(L) if sequences else None
    rows = B if offsets is None else len(offsets) - 1
    return {
        "q": draw.normal(B, L, G or H, K),
        "k": draw.unit(B, L, G or H, K),
        "v": draw.normal(B, L, H, V),
        "g": -draw.uniform(B, L, H, dtype=torch.float32) if gates else None,
        "beta": draw.uniform(B, L, H, dtype=torch.float32) if gates else None,
        "initial_state": draw.normal(rows, H, K, V, dtype=torch.float32) if initial else None,
        "document_ids": draw.documents(B, L) if documents else None,
        "cu_seqlens": offsets,
        "return_final_state": initial,
    }


def _flops(backward: bool, *, B: int, L: int, H: int, K: int, V: int, **_: Any) -> Flops:
    """One read and one write of the state per token, K V multiply-adds each; backward twice that."""
    return Flops((3 if backward else 1) * 2 * B * L * H * K * 2 * V)


def _step_inputs(draw: Draw, *, B: int, H: int, K: int, V: int, G: int | None = None) -> dict[str, Any]:
    scan = _inputs(draw, B=B, L=1, H=H, K=K, V=V, G=G)
    state = draw.normal(B, H, K, V, dtype=torch.float32)
    return {f"{name}_t": scan[name][:, 0] for name in ("q", "k", "v", "g", "beta")} | {"state": state}


def _step_flops(backward: bool, *, B: int, H: int, K: int, V: int, **_: Any) -> Flops:
    return Flops(other=5 * B * H * K * V)


_HEADS = {"B": 1, "L": 512, "H": 4, "K": 64, "V": 64}
_ONE_GROUP = {**_HEADS, "G": 1}
_SHORT = {"B": 1, "L": 70, "G": 1, "H": 2, "K": 64, "V": 64}

CASES = [
    Case(
        run=ssd,
        inputs=_inputs,
        like=("v",),
        flops=_flops,
        small={
            "forward": Size(_HEADS, backward=False),
            "backward": Size(_HEADS),
            "forward_groups": Size(_ONE_GROUP, backward=False),
            "backward_groups": Size(_ONE_GROUP),
            "backward_128": Size({"B": 2, "L": 70, "G": 1, "H": 2, "K": 128, "V": 64}),  # Mamba-2's state size
            "backward_float32": Size(_SHORT, torch.float32),
            "backward_128_float32": Size({**_SHORT, "L": 40, "K": 128}, torch.float32),
            "backward_sequences": Size({**_SHORT, "initial": True, "sequences": True}),
        },
        odd=(
            {"B": 2, "L": 63, "G": 1, "H": 2, "K": 24, "V": 9, "initial": True, "documents": True},
            {"B": 1, "L": 1, "H": 1, "K": 16, "V": 5, "gates": False},
            {"B": 1, "L": 200, "G": 1, "H": 2, "K": 128, "V": 64, "initial": True},
            {"B": 1, "L": 70, "G": 1, "H": 2, "K": 24, "V": 9, "initial": True, "sequences": True},
        ),
        models={"Mamba-2 130M: 24 heads, K 128, V 64, 16384 tokens": {
            "B": 8, "L": 2048, "G": 1, "H": 24, "K": 128, "V": 64,
        }},
    ),
    Case(
        run=ssd_step,
        inputs=_step_inputs,
        like=("v_t", "state"),
        flops=_step_flops,
        small={"step": Size({"B": 4, "G": 1, "H": 4, "K": 128, "V": 64})},
        odd=({"B": 2, "G": 2, "H": 4, "K": 5, "V": 70}, {"B": 3, "H": 1, "K": 130, "V": 6}),
        models={"Mamba-2 130M: 64 rows, 24 heads, K 128, V 64": {"B": 64, "G": 1, "H": 24, "K": 128, "V": 64}},
        gradients=False,
    ),
]  # fmt: skip

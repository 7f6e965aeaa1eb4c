"""`causal_conv1d` and `causal_conv1d_step` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import causal_conv1d, causal_conv1d_step


def _inputs(
    draw: Draw, *, B: int, L: int, C: int, K: int, activation: str | None = "silu", initial: bool = False,
    documents: bool = False, sequences: bool = False, final: bool = False,
) -> dict[str, Any]:  # fmt: skip
    offsets = draw.offsets(L) if sequences else None
    rows = B if offsets is None else len(offsets) - 1
    return {
        "x": draw.normal(B, L, C),
        "weight": draw.normal(C, K),
        "bias": draw.normal(C),
        "activation": activation,
        "initial_state": draw.normal(rows, K - 1, C) if initial else None,
        "document_ids": draw.documents(B, L).int() if documents else None,
        "cu_seqlens": offsets,
        "return_final_state": final,
    }


def _flops(backward: bool, *, B: int, L: int, C: int, K: int, **_: Any) -> Flops:
    numbers = B * L * C
    return Flops(other=(8 * K + 16 if backward else 2 * K + 5) * numbers, exponentials=(1 + backward) * numbers)


def _step_inputs(draw: Draw, *, B: int, C: int, K: int) -> dict[str, Any]:
    x = _inputs(draw, B=B, L=1, C=C, K=K)
    return {"x_t": x["x"][:, 0], "state": draw.normal(B, K - 1, C)} | {
        k: x[k] for k in ("weight", "bias", "activation")
    }


def _step_flops(backward: bool, *, B: int, C: int, K: int) -> Flops:
    return Flops(other=B * C * (2 * K + 5), exponentials=B * C)


CASES = [
    Case(
        run=causal_conv1d,
        inputs=_inputs,
        like=("x",),
        flops=_flops,
        small={
            "forward": Size({"B": 1, "L": 64, "C": 256, "K": 4}, backward=False),
            "backward": Size({"B": 1, "L": 64, "C": 128, "K": 4}),
            "backward_float32_documents": Size(
                {"B": 1, "L": 64, "C": 128, "K": 4, "initial": True, "documents": True}, torch.float32
            ),
            "backward_sequences": Size({"B": 1, "L": 64, "C": 128, "K": 4, "initial": True, "sequences": True}),
        },
        odd=(
            {"B": 2, "L": 63, "C": 70, "K": 4, "initial": True, "documents": True, "final": True},
            {"B": 1, "L": 1, "C": 3, "K": 2, "activation": None},
            {"B": 2, "L": 300, "C": 96, "K": 3, "initial": True, "final": True},
            {"B": 1, "L": 90, "C": 70, "K": 4, "initial": True, "sequences": True, "final": True},
        ),
        models={"Mamba-130M: (8, 2048, 1536), 4 taps, bf16": {"B": 8, "L": 2048, "C": 1536, "K": 4}},
    ),
    Case(
        run=causal_conv1d_step,
        inputs=_step_inputs,
        like=("x_t", "state"),
        flops=_step_flops,
        small={"step": Size({"B": 4, "C": 512, "K": 4})},
        odd=({"B": 3, "C": 70, "K": 4}, {"B": 1, "C": 3, "K": 2}),
        models={"Mamba-130M: (64, 1536), 4 taps, bf16": {"B": 64, "C": 1536, "K": 4}},
        gradients=False,
    ),
]

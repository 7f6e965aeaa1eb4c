"""`selective_scan` and `selective_scan_step` from outside: see `kernels/selftest/case.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..selftest.case import Case, Draw, Flops, Size
from . import selective_scan, selective_scan_step


def _inputs(
    draw: Draw, *, B: int, L: int, D: int, N: int, G: int = 1, gate: bool = True, initial: bool = False,
    documents: bool = False, sequences: bool = False, final: bool = False,
) -> dict[str, Any]:  # fmt: skip
    offsets = draw.offsets(L) if sequences else None
    rows = B if offsets is None else len(offsets) - 1
    return {
        "u": draw.normal(B, L, D),
        "delta": draw.normal(B, L, D),
        "A": -draw.uniform(D, N, dtype=torch.float32),
        "B": draw.normal(B, L, G, N),
        "C": draw.normal(B, L, G, N),
        "D": draw.normal(D, dtype=torch.float32),
        "z": draw.normal(B, L, D) if gate else None,
        "delta_bias": draw.normal(D, dtype=torch.float32),
        "delta_softplus": True,
        "initial_state": draw.normal(rows, D, N, dtype=torch.float32) if initial else None,
        "document_ids": draw.documents(B, L) if documents else None,
        "cu_seqlens": offsets,
        "return_final_state": initial or final,
    }


def _flops(backward: bool, *, B: int, L: int, D: int, N: int, **_: Any) -> Flops:
    """Of each state: 7 flops forward, 27 with backward; an exponential in each pass, and three for the gates."""
    numbers = B * L * D
    other = (27 * N + 40 if backward else 7 * N + 12) * numbers
    return Flops(other=other, exponentials=(2 if backward else 1) * (N + 3) * numbers)


def _step_inputs(draw: Draw, *, B: int, D: int, N: int, G: int = 1) -> dict[str, Any]:
    scan = _inputs(draw, B=B, L=1, D=D, N=N, G=G)
    tokens = {f"{name}_t": scan[name][:, 0] for name in ("u", "delta", "B", "C", "z")}
    fixed = {name: scan[name] for name in ("A", "D", "delta_bias", "delta_softplus")}
    return tokens | fixed | {"state": draw.normal(B, D, N, dtype=torch.float32)}


def _step_flops(backward: bool, *, B: int, D: int, N: int, **_: Any) -> Flops:
    return Flops(other=B * D * (7 * N + 12), exponentials=B * D * (N + 3))


CASES = [
    Case(
        run=selective_scan,
        inputs=_inputs,
        like=("u",),
        flops=_flops,
        small={
            "forward": Size({"B": 1, "L": 128, "D": 128, "N": 16, "final": True}, backward=False),
            "backward": Size({"B": 1, "L": 128, "D": 128, "N": 16}),
            "backward_float32_documents": Size(
                {"B": 1, "L": 100, "D": 64, "N": 8, "G": 2, "documents": True}, torch.float32
            ),
            "backward_sequences": Size({"B": 1, "L": 100, "D": 64, "N": 16, "initial": True, "sequences": True}),
        },
        odd=(
            {"B": 2, "L": 37, "D": 34, "N": 5, "G": 2, "initial": True, "documents": True},
            {"B": 1, "L": 1, "D": 3, "N": 1, "gate": False},
            {"B": 1, "L": 300, "D": 96, "N": 16, "initial": True},
            {"B": 1, "L": 90, "D": 34, "N": 5, "G": 2, "initial": True, "sequences": True},
        ),
        models={
            "Mamba-130M: (8, 2048, 1536), 1 groups, 16 states, bf16": {"B": 8, "L": 2048, "D": 1536, "N": 16},
            "Mamba-2.8B: (8, 2048, 5120), 1 groups, 16 states, bf16": {"B": 8, "L": 2048, "D": 5120, "N": 16},
            "VMamba-T stage 1 at 224: (128, 3136, 768), 4 groups, 1 states, bf16": {
                "B": 128, "L": 3136, "D": 768, "N": 1, "G": 4,
            },
        },
    ),
    Case(
        run=selective_scan_step,
        inputs=_step_inputs,
        like=("u_t", "state"),
        flops=_step_flops,
        small={"step": Size({"B": 2, "D": 256, "N": 16})},
        odd=({"B": 2, "D": 70, "N": 5, "G": 2}, {"B": 3, "D": 1, "N": 1}),
        models={"Mamba-130M: (64, 1536), 16 states, bf16": {"B": 64, "D": 1536, "N": 16}},
        gradients=False,
    ),
]  # fmt: skip

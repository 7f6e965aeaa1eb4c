"""The one filter through which every autotune list passes."""

from __future__ import annotations

import os
from collections.abc import Mapping

import triton
from triton import knobs

from .interpreter import mend

mend()

Candidate = tuple[Mapping[str, int], int, int]


def configs(*candidates: Candidate) -> list[triton.Config]:
    """Autotune configs from `(constants, num_warps, num_stages)`; put the default one first.

    Only the first is kept under the interpreter, which cannot time, and where `MIXERZOO_AUTOTUNE=0` asks for runs that
    are the same every time: configs sum in different orders, so that another choice changes the last bits.
    """
    if knobs.runtime.interpret or os.environ.get("MIXERZOO_AUTOTUNE", "1") == "0":
        candidates = candidates[:1]
    return [triton.Config(dict(c), num_warps=warps, num_stages=stages) for c, warps, stages in candidates]

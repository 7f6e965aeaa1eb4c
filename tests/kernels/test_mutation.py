"""The tests' own tools: a mutant is seen by everybody, a crash is no wrong number, the unbroken kernel comes first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mixerzoo.kernels import shift
from mixerzoo.tests.kernels.utils import agrees, compare, mutated
from triton.runtime.errors import InterpreterError

OLD, WRONG, CRASH = "(source < size)", "(source <= size)", "(source < sizes)"


def check() -> None:
    compare(shift, {"x": torch.randn(1, 3, 5, 4)}, "triton", shifts=[(1, 0), (-2, 3)], padding="zeros")


def test_wrong_number_is_told_from_a_crash(tmp_path) -> None:
    assert agrees(check)
    with mutated("shift", OLD, WRONG, tmp_path):
        assert not agrees(check)
    with mutated("shift", OLD, CRASH, tmp_path):
        with pytest.raises(InterpreterError, match="sizes"):
            agrees(check)
        assert not agrees(check, crashes=True)
    assert agrees(check)


def test_a_check_that_the_unbroken_kernel_fails_is_no_proof(tmp_path) -> None:
    def always_fails() -> None:
        raise AssertionError("even without a mutant")

    with mutated("shift", OLD, WRONG, tmp_path), pytest.raises(AssertionError, match="without a mutant"):
        agrees(always_fails)


def test_every_way_to_a_module_leads_to_the_mutant(tmp_path) -> None:
    from mixerzoo.kernels.shift import triton as before

    with mutated("shift", OLD, WRONG, tmp_path):
        from mixerzoo.kernels.shift import triton as meanwhile

        assert meanwhile is sys.modules["mixerzoo.kernels.shift.triton"]
        assert WRONG in Path(meanwhile.__file__).read_text()
    from mixerzoo.kernels.shift import triton as after

    assert after is before


def test_modules_that_read_a_mutant_are_loaded_anew(tmp_path) -> None:
    from mixerzoo.kernels import gla
    from mixerzoo.tests.kernels.scans import scan_inputs

    inputs = scan_inputs("gla", 1, 5, 2, 3, 4)
    compare(gla, inputs, "triton")  # `gla/triton.py` is loaded, and has taken what it needs from `common/tiles.py`
    reader = sys.modules["mixerzoo.kernels.gla.triton"]
    with mutated("common", '"""Pieces', '"""Parts', tmp_path, files=("tiles",)):
        assert sys.modules["mixerzoo.kernels.gla.triton"] is not reader
        compare(gla, inputs, "triton")
    assert sys.modules["mixerzoo.kernels.gla.triton"] is reader

"""`benchmarks/kernels.py`, as far as it goes without a GPU: sizes, floors and messages. Nothing is timed."""

from __future__ import annotations

import pytest
import torch
from mixerzoo import kernels
from mixerzoo.benchmarks.kernel_subjects import Subject, subjects
from mixerzoo.benchmarks.kernels import cost_of, main
from mixerzoo.kernels.common.costs import nbytes
from mixerzoo.kernels.common.discovery import find_cases, find_rooflines

SUBJECTS = {f"{s.op} {s.size}": s for s in subjects()}


def test_every_op_is_timed():
    timed = {s.op for s in SUBJECTS.values()}
    ops = {name.split(".")[0] for name in find_cases()}
    steps = {name for name in kernels.__all__ if name.endswith("_step")}
    assert timed == ops | steps


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_inputs_have_the_size_of_the_floor(subject: Subject):
    costs = find_rooflines()
    inputs = subject.inputs("meta")
    outputs = [inputs[i] for i in subject.like]
    forward = cost_of(subject, False, costs)
    assert forward is not None
    assert forward.bytes == pytest.approx(nbytes(*inputs, *outputs), rel=0.02)
    if subject.backward:
        backward = cost_of(subject, True, costs)
        assert backward is not None
        assert backward.bytes == pytest.approx(2 * nbytes(*inputs, *outputs), rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "found no GPU" in capsys.readouterr().err


def test_mistakes_are_explained(capsys):
    assert main(["--only", "sdd"]) == 2
    assert 'Did you mean "ssd"?' in capsys.readouterr().err

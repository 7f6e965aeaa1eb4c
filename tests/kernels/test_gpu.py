"""What only a GPU can show, beside the self-test: graphs, streams, no waiting for the GPU, and what `auto` takes.

MIXERZOO_TEST_GPU=1 pytest -m gpu tests/kernels/test_gpu.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.selftest.case import Case, Draw
from mixerzoo.kernels.selftest.comparison import error, evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("MIXERZOO_TEST_GPU") != "1",
        reason="needs a GPU and MIXERZOO_TEST_GPU=1",
    ),
]


@pytest.fixture(params=list(find_ops()))
def case(request: pytest.FixtureRequest) -> Case:
    return find_ops([request.param])[request.param]


def inputs_of(case: Case) -> dict[str, Any]:
    return case.inputs(Draw("cuda", case.dtypes[0]), **case.odd[0])


def outputs_of(case: Case, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        y = case.run(**inputs, backend="triton")
    return list(y) if isinstance(y, tuple) else [y]


def test_under_compile(case):
    inputs = inputs_of(case)
    plain = evaluate(case.run, inputs, gradients=case.gradients, backend="triton")
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=False)
    for name, y in evaluate(compiled, inputs, gradients=case.gradients, backend="triton").items():
        assert torch.equal(y.nan_to_num(), plain[name].nan_to_num()), name


def test_nothing_waits_for_the_gpu(case):
    inputs = inputs_of(case)
    outputs_of(case, inputs)  # compiled and tuned
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_of(case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_graph_and_on_another_stream(case):
    inputs = inputs_of(case)
    expected = outputs_of(case, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            other = outputs_of(case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_of(case, inputs)
    for y in captured:
        y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(expected, other, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_auto_takes_the_kernels(case):
    """And the numbers of `auto` are theirs, bit by bit; in float64 it goes to PyTorch instead of raising."""
    inputs = inputs_of(case)
    with torch.no_grad():
        y = case.run(**inputs)
    assert torch.equal((y[0] if isinstance(y, tuple) else y), outputs_of(case, inputs)[0])
    if torch.complex64 in case.dtypes:
        return
    wide = case.inputs(Draw("cuda", torch.float64), **case.odd[0])
    with torch.no_grad():
        ours, theirs = (case.run(**wide, backend=b) for b in ("auto", "reference"))
    pair = (ours[0], theirs[0]) if isinstance(ours, tuple) else (ours, theirs)
    assert error(*pair) < 1e-6


def test_tensors_on_the_cpu_are_refused_by_name(case):
    inputs = case.inputs(Draw("cpu", case.dtypes[0]), **case.odd[0])
    with pytest.raises(RuntimeError, match="cpu"), torch.no_grad():
        case.run(**inputs, backend="triton")

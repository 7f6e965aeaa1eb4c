"""The mark that `torch.compile` looks for is that of PyTorch's own decorator."""

from __future__ import annotations

import torch
from mixerzoo.kernels.constant import constant_result


def test_the_mark_is_pytorchs():
    def theirs() -> int:
        return 1

    def ours() -> int:
        return 1

    assert vars(torch.compiler.assume_constant_result(theirs)) == vars(constant_result(ours)) != {}


def test_it_is_called_at_tracing_alone():
    calls = []

    @constant_result
    def factor() -> int:
        calls.append(1)  # no compiler could trace a list outside
        return 3

    compiled = torch.compile(lambda x: x * factor(), fullgraph=True, backend="eager")
    assert [float(compiled(torch.tensor(2.0))) for _ in range(3)] == [6.0] * 3
    assert len(calls) == 1

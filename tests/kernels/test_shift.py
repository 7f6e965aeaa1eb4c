"""shift: closed forms against torch.roll, and every path against the reference."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import shift
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated, skewed

BACKENDS = ["reference", "eager", "triton"]
CASES = [
    ((2, 5, 3), [1, -2, 0]),
    ((1, 1, 4), [1, -1]),
    ((2, 5, 4, 8), [(1, 0), (-2, 3), (7, -7)]),
    ((1, 3, 5, 4, 5), [(1, 0, 0), (-2, 3, 1), (0, -7, 7)]),
    ((2, 41, 70), [3, -41, 50]),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend):
    x = torch.randn(2, 5, 4, 7)
    wrapped = shift(x, [(1, 0), (-2, 3)], padding="wrap", backend=backend)
    assert torch.equal(wrapped[..., :4], x[..., :4].roll(1, 1)), "positive offsets move content to larger indices"
    assert torch.equal(wrapped[..., 4:], x[..., 4:].roll((-2, 3), (1, 2)))
    zeros = shift(x, [(1, 0), (0, -1)], backend=backend)
    assert torch.equal(zeros[:, 1:, :, :4], x[:, :-1, :, :4])
    assert not zeros[:, 0, :, :4].any()
    assert torch.equal(zeros[:, :, :-1, 4:], x[:, :, 1:, 4:])
    assert not zeros[:, :, -1, 4:].any()


@pytest.mark.parametrize("padding", ["zeros", "wrap"])
def test_reference_gradients(padding):
    check_reference(shift, {"x": torch.randn(1, 3, 4, 3)}, shifts=[(1, 0), (-2, 5)], padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["zeros", "wrap"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("shape", "shifts"), CASES)
def test_equals_the_reference(shape, shifts, backend, padding, dtype):
    x = torch.randn(shape).to(dtype)
    compare(shift, {"x": x}, backend, shifts=shifts, padding=padding)
    compare(shift, {"x": skewed(x)}, backend, shifts=shifts, padding=padding)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_empty(backend):
    assert shift(torch.zeros(2, 0, 4), [1, 0], backend=backend).shape == (2, 0, 4)


def test_opcheck():
    from mixerzoo.kernels.shift import eager, triton

    x = torch.randn(1, 5, 4, requires_grad=True)
    torch.library.opcheck(eager.shift_eager.op, (x, [1, -1], True))
    torch.library.opcheck(triton.shift_triton.op, (x, [1, -1], False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    x = torch.randn(1, 3, 4, 4)
    compiled = torch.compile(lambda x: shift(x, [(1, 0), (0, 1)], backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), shift(x, [(1, 0), (0, 1)], backend=backend))


MUTANTS = [
    ("(source < size)", "(source <= size)"),
    ("(source >= 0)", "(source >= -1)"),
    ("source + size, source", "source, source"),
    ("c // SIZE == g", "c // SIZE >= g + 1"),
    ("h * x_h", "h * channels"),
    ("[-d for d in shifts]", "list(shifts)"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    x = skewed(torch.randn(2, 5, 4, 7))

    def check() -> None:
        for padding in ("zeros", "wrap"):
            compare(shift, {"x": x}, "triton", shifts=[(1, 0), (-2, 3), (0, -1)], padding=padding)

    with mutated("shift", old, new, tmp_path):
        assert not agrees(check)


def test_mistakes_are_named():
    x = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ConfigError, match="shifts="):
        shift(x, [1, 2])
    with pytest.raises(ConfigError, match="4 channels cannot be divided into 3 groups"):
        shift(x, [(0, 1)] * 3)
    with pytest.raises(ConfigError, match='"wrap"'):
        shift(x, [(0, 1)], padding="warp")

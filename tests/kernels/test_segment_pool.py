"""segment_pool: closed forms, PoNet's official numbers, and every path against the reference."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import segment_pool
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated, skewed
from mixerzoo.tests.utils import load_golden, relative_error
from torch import Tensor

BACKENDS = ["reference", "eager", "triton"]


def inputs(batch: int, length: int, channels: int, dtype: torch.dtype = torch.float32, *, mask: bool = False):
    """Random inputs without equal values next to each other in float32."""
    generator = torch.Generator().manual_seed(length)
    shape = (batch, length, channels)
    found: dict[str, Tensor] = {k: torch.randn(shape, generator=generator).to(dtype) for k in ("segment", "local")}
    if mask:
        found["mask"] = torch.rand(batch, length, generator=generator) < 0.5
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form(backend):
    x = torch.tensor([1.0, 5.0, 2.0, 0.0, 3.0]).view(1, 5, 1)
    by_segment, by_window = segment_pool(x, x, segment_length=2, backend=backend)
    assert by_segment.flatten().tolist() == [5, 5, 2, 2, 3]
    assert by_window.flatten().tolist() == [5, 5, 5, 3, 3]
    mask = torch.tensor([[True, False, False, False, True]])
    by_segment, by_window = segment_pool(x, x, segment_length=2, mask=mask, backend=backend)
    assert by_segment.flatten().tolist() == [1, 1, -10000, -10000, 3]
    assert by_window.flatten().tolist() == [1, 1, -10000, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_values_takes_the_gradient(backend):
    x = torch.zeros(1, 4, 1, requires_grad=True)
    by_segment, by_window = segment_pool(x, x, segment_length=3, backend=backend)
    (dx,) = torch.autograd.grad(by_segment.sum(), x, retain_graph=True)
    assert dx.flatten().tolist() == [3, 0, 0, 1]
    (dx,) = torch.autograd.grad(by_window.sum(), x)
    assert dx.flatten().tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    golden = load_golden("ponet_pooling")
    q, k, o, segment, local = (
        golden[f"input.{n}"].clone().requires_grad_() for n in ("Q", "K", "O", "segment", "local")
    )
    mask = golden["input.attention_mask"] > 0.5
    batch, heads, length, size = q.shape
    valid = mask[:, None, :, None]
    mean = (q * valid).sum(2, keepdim=True) / valid.sum(2, keepdim=True)
    scores = (mean * k).sum(-1) / size**0.5
    weights = torch.where(mask[:, None], scores, -10000.0).softmax(-1)
    everywhere = (weights[..., None] * k).sum(2, keepdim=True)
    segment_length = golden.kwargs["segment_len"]
    assert segment_length == length // golden.kwargs["segment_num"] + 1
    pooled = segment_pool(segment, local, segment_length=segment_length, mask=mask, backend=backend)
    by_segment, by_window = (t.view(batch, length, heads, size).transpose(1, 2) for t in pooled)
    y = torch.where(valid, (everywhere + by_segment) * o + by_window, 0).transpose(1, 2).flatten(2)
    assert relative_error(y, golden["output"]) < 1e-5
    grads = torch.autograd.grad(y, (segment, local), golden["cotangent"])
    for name, grad in zip(("segment", "local"), grads, strict=True):
        assert relative_error(grad, golden[f"grad.input.{name}"]) < 1e-5


def test_reference_gradients():
    check_reference(segment_pool, inputs(2, 7, 2), segment_length=3)
    check_reference(segment_pool, inputs(2, 7, 2, mask=True), segment_length=3, window=5)


CASES = [((2, 11, 3), 4, 3), ((1, 1, 2), 5, 3), ((1, 41, 3), 20, 5), ((2, 6, 70), 1, 1), ((1, 5, 2), 9, 7)]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("shape", "segment_length", "window"), CASES)
def test_equals_the_reference(shape, segment_length, window, backend, dtype, mask):
    given = inputs(*shape, dtype, mask=mask)
    compare(segment_pool, given, backend, segment_length=segment_length, window=window)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strides(backend):
    compare(segment_pool, {k: skewed(v) for k, v in inputs(2, 9, 5, mask=True).items()}, backend, segment_length=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    x = torch.zeros(2, 0, 3)
    assert [t.shape for t in segment_pool(x, x, segment_length=2, backend=backend)] == [(2, 0, 3)] * 2


def test_opcheck():
    from mixerzoo.kernels.segment_pool import triton

    given = inputs(1, 5, 3, mask=True)
    leaves = [given[k].requires_grad_() for k in ("segment", "local")]
    torch.library.opcheck(triton.forward_op.op, (*leaves, 2, 1, given["mask"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    given = inputs(1, 5, 3, mask=True)

    def function(segment, local, mask):
        return segment_pool(segment, local, segment_length=2, mask=mask, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(**given), function(**given), strict=True):
        assert torch.equal(ours, theirs)


MUTANTS = [
    ("(x > z)", "(x >= z)"),
    ("(largest > best)", "(largest < best)"),
    ("== largest[None, :])", ">= -1000.0)"),
    ("tl.cast(t, tl.int64)[:, None] * stride", "tl.cast(t, tl.int64)[:, None] * 2"),
    ("exists = (t >= 0) & (t < length)", "exists = (t >= 1) & (t < length)"),
    ("(t + j < length)[:, None]", "(t + j < length - 1)[:, None]"),
    ("total += tl.sum", "total = tl.sum"),
    ("dlocal += tl.where", "dlocal = tl.where"),
    ("offset.to(tl.int32) == -j", "offset.to(tl.int32) == j"),
    ("dx = tl.where(kept[:, None], dx, 0.0)", "dx = dx"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    given = inputs(1, 41, 3, mask=True)
    given["mask"][:, 20:40] = False  # a masked segment: nobody receives its gradient
    ties = {k: v.round() for k, v in inputs(1, 9, 3).items()}

    def check() -> None:
        compare(segment_pool, given, "triton", segment_length=20)
        compare(segment_pool, ties, "triton", segment_length=4)

    with mutated("segment_pool", old, new, tmp_path):
        assert not agrees(check)


def test_mistakes_are_named():
    x = torch.zeros(1, 4, 2)
    with pytest.raises(ConfigError, match="window=2"):
        segment_pool(x, x, segment_length=2, window=2)
    with pytest.raises(ConfigError, match="segment_length=0"):
        segment_pool(x, x, segment_length=0)
    with pytest.raises(ConfigError, match="one shape"):
        segment_pool(x, x[:, 1:], segment_length=2)
    with pytest.raises(ConfigError, match="mask has shape"):
        segment_pool(x, x, segment_length=2, mask=torch.ones(4, dtype=torch.bool))

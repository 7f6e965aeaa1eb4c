"""pool_mix: closed forms, the official numbers, and every path against the reference."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import pool_mix
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, error, mutated, skewed
from mixerzoo.tests.utils import load_golden, relative_error
from torch import Tensor

BACKENDS = ["reference", "eager", "triton"]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, mask: bool = False, documents: bool = False):
    """Random inputs; whole rows are masked now and then, too."""
    generator = torch.Generator().manual_seed(sum(shape))
    found: dict[str, Tensor] = {"x": torch.randn(shape, generator=generator).to(dtype)}
    if mask:
        found["mask"] = torch.rand(shape[:-1], generator=generator) < 0.6
    if documents:
        found["document_ids"] = (torch.rand(shape[:-1], generator=generator) < 0.3).int().cumsum(1) % 2
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend):
    x = torch.tensor([1.0, 2.0, 6.0, 3.0]).view(1, 4, 1)
    centred = torch.tensor([0.5, 1.0, 11 / 3 - 6, 1.5]).view(1, 4, 1)
    assert error(pool_mix(x, backend=backend), centred) < 1e-6
    causal = torch.tensor([0.0, -0.5, -3.0, 11 / 3 - 3]).view(1, 4, 1)
    assert error(pool_mix(x, causal=True, backend=backend), causal) < 1e-6
    apart = torch.tensor([0.0, -0.5, 0.0, 1.5]).view(1, 4, 1)
    ids = torch.tensor([[4, 4, 7, 7]])
    assert error(pool_mix(x, causal=True, document_ids=ids, backend=backend), apart) < 1e-6
    masked = torch.tensor([0.5, -0.5, 0.0, 0.0]).view(1, 4, 1)
    mask = torch.tensor([[True, True, False, True]])
    assert error(pool_mix(x, mask=mask, backend=backend), masked) < 1e-6
    constant = torch.ones(1, 4, 3, 2)
    assert pool_mix(constant, backend=backend).abs().max() < 1e-6, "the border must not count"


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    golden = load_golden("poolformer_pooling")
    x = golden["input"].permute(0, 2, 3, 1).requires_grad_()
    y = pool_mix(x, pool_size=golden.kwargs["pool_size"], backend=backend)
    (dx,) = torch.autograd.grad(y, x, golden["cotangent"].permute(0, 2, 3, 1))
    assert relative_error(y.permute(0, 3, 1, 2), golden["output"]) < 1e-5
    assert relative_error(dx.permute(0, 3, 1, 2), golden["grad.input"]) < 1e-5


def test_reference_gradients():
    check_reference(pool_mix, inputs(1, 3, 4, 2, mask=True))
    check_reference(pool_mix, inputs(2, 6, 2, mask=True, documents=True), causal=True, pool_size=4)


CASES = [
    ((2, 9, 7, 3), {}),
    ((1, 6, 1, 2), {"pool_size": 5}),
    ((1, 12, 11, 2), {"pool_size": 9}),
    ((2, 13, 3), {"pool_size": 5}),
    ((1, 1, 3), {}),
    ((1, 41, 3), {"pool_size": 4, "causal": True}),
    ((2, 3, 2), {"pool_size": 11, "causal": True}),
    ((1, 2, 3, 4, 2), {}),
    ((1, 1, 1, 2), {"pool_size": 1}),
]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("shape", "options"), CASES)
def test_eager(shape, options, mask):
    compare(pool_mix, inputs(*shape, mask=mask), "eager", **options)
    if options.get("causal"):
        compare(pool_mix, inputs(*shape, mask=mask, documents=True), "eager", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_eager_dtypes(dtype):
    compare(pool_mix, inputs(2, 5, 4, 3, dtype=dtype), "eager")
    compare(pool_mix, {"x": skewed(inputs(2, 5, 4, 3, dtype=dtype)["x"])}, "eager")


TRITON = [
    ((2, 9, 5, 3), {}, False, False),
    ((1, 4, 3, 2), {"pool_size": 5}, True, False),
    ((1, 5, 3), {}, False, False),
    ((2, 9, 3), {"pool_size": 4, "causal": True}, True, True),
    ((1, 2, 3, 2, 2), {}, False, False),
    ((1, 1, 1, 2), {}, False, False),
]


@pytest.mark.parametrize(("shape", "options", "mask", "documents"), TRITON)
def test_triton(shape, options, mask, documents):
    compare(pool_mix, inputs(*shape, mask=mask, documents=documents), "triton", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_dtypes_and_strides(dtype):
    compare(pool_mix, {"x": skewed(inputs(1, 3, 4, 5, dtype=dtype)["x"])}, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "options"), CASES)
def test_triton_everywhere(shape, options, dtype, mask):
    compare(pool_mix, inputs(*shape, dtype=dtype, mask=mask), "triton", **options)
    if options.get("causal"):
        compare(pool_mix, inputs(*shape, dtype=dtype, mask=mask, documents=True), "triton", **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_empty(backend):
    x = torch.zeros(0, 3, 3, 2, requires_grad=True)
    pool_mix(x, backend=backend).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_opcheck():
    from mixerzoo.kernels.pool_mix import eager, triton

    x = torch.randn(1, 5, 3, requires_grad=True)
    mask, ids = torch.rand(1, 5) < 0.7, torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)
    torch.library.opcheck(eager.pool_mix_eager.op, (x, 3, True, mask, ids))
    torch.library.opcheck(triton.forward_op.op, (x, 3, True, mask, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    x = torch.randn(1, 3, 4, 2)
    compiled = torch.compile(lambda x: pool_mix(x, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), pool_mix(x, backend=backend))


MUTANTS = [  # text of the kernel, its broken form, the case that exposes it
    ("(column < width)", "(column <= width)", "image"),
    ("(row >= 0)", "(row >= 1)", "image"),
    ("line += x", "line = x", "image"),
    ("(row - h <= AH)", "(row - h < AH)", "image"),
    ("own = (h == row) &", "own = (h == row + 1) &", "image"),
    ("x *= inverse[:, None]", "x *= 1.0", "image"),
    ("column * x_w", "column * channels", "strided"),
    ("valid.to(tl.float32)", "1.0 + valid.to(tl.float32) * 0.0", "sequence"),
    ("seen &= document ==", "seen |= document ==", "sequence"),
    ("if transposed else (b, a)", "if False else (b, a)", "sequence"),
]


@pytest.mark.parametrize(("old", "new", "case"), MUTANTS)
def test_broken_kernel_is_caught(old, new, case, tmp_path):
    def check() -> None:
        if case == "sequence":
            given = inputs(1, 9, 2, mask=True, documents=True)
            compare(pool_mix, given, "triton", causal=True)
        else:
            x = inputs(1, 3, 5, 2)["x"]
            wide = inputs(1, 3, 10, 2)["x"][:, :, ::2]  # channels stay together: the host copies other layouts
            compare(pool_mix, {"x": wide if case == "strided" else x}, "triton")

    with mutated("pool_mix", old, new, tmp_path):
        assert not agrees(check)


def test_mistakes_are_named():
    x = torch.zeros(1, 4, 4, 2)
    with pytest.raises(ConfigError, match="pool_size=2"):
        pool_mix(x, pool_size=2)
    with pytest.raises(ConfigError, match="causal=True"):
        pool_mix(x, causal=True)
    with pytest.raises(ConfigError, match="document_ids"):
        pool_mix(x[0], document_ids=torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="mask has shape"):
        pool_mix(x, mask=torch.ones(1, 4, dtype=torch.bool))

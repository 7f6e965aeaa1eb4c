"""token_mlp: linear layers on transposed tokens, and every path against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import token_mlp
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, error, mutated, skewed
from mixerzoo.tests.utils import rounding
from torch import Tensor

BACKENDS = ["reference", "eager", "triton"]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu"]


def inputs(samples: int, tokens: int, hidden: int, channels: int, out: int | None = None, dtype=torch.float32):
    """Random inputs of about unit size throughout."""
    generator = torch.Generator().manual_seed(tokens)
    out = tokens if out is None else out
    shapes = {"x": (samples, tokens, channels), "w1": (hidden, tokens), "b1": (hidden,)}
    shapes |= {"w2": (out, hidden), "b2": (out,)}
    found: dict[str, Tensor] = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    found["w1"] /= max(1, tokens) ** 0.5
    found["w2"] /= hidden**0.5
    return {k: v.to(dtype) for k, v in found.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_two_linear_layers_on_transposed_tokens(backend):
    x, w1, b1, w2, b2 = inputs(2, 5, 7, 3).values()
    expected = F.linear(F.gelu(F.linear(x.mT, w1, b1)), w2, b2).mT
    assert error(token_mlp(x, w1, b1, w2, b2, backend=backend), expected) < 1e-5
    without = F.linear(F.gelu(F.linear(x.mT, w1)), w2).mT
    assert error(token_mlp(x, w1, None, w2, None, backend=backend), without) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradients(activation):
    check_reference(token_mlp, inputs(2, 3, 4, 2), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_activations(backend, activation):
    compare(token_mlp, inputs(2, 7, 9, 5), backend, activation=activation)


@pytest.mark.parametrize("size", [(3, 41, 67, 70, 33), (1, 1, 1, 1), (300, 3, 4, 900), (2, 5, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eager(size, dtype):
    compare(token_mlp, inputs(*size, dtype=dtype), "eager")


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((2, 41, 67, 70, 33), torch.float32),
        ((1, 1, 1, 1), torch.float32),
        ((2, 33, 17, 20), torch.bfloat16),
        ((2, 5, 3, 4), torch.float16),
    ],
)
def test_triton(size, dtype):
    compare(token_mlp, {k: skewed(v) for k, v in inputs(*size, dtype=dtype).items()}, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(3, 63, 100, 41), (1, 196, 65, 129), (5, 64, 64, 64), (9, 1, 130, 3)])
def test_triton_everywhere(size, activation, dtype):
    compare(token_mlp, inputs(*size, dtype=dtype), "triton", activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in inputs(0, 3, 4, 2).values())
    token_mlp(x, w1, b1, w2, b2, backend=backend).sum().backward()
    assert w1.grad is not None
    assert not w1.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_that_of_a_linear_layer(backend):
    given = inputs(1, 5, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = token_mlp(**given, backend=backend)
    assert y.dtype == torch.bfloat16
    assert error(y, token_mlp(**given, backend="reference")) < rounding(torch.bfloat16, 5, 4)


def test_opcheck():
    from mixerzoo.kernels.token_mlp import triton

    given = [t.requires_grad_() for t in inputs(2, 3, 4, 2).values()]
    torch.library.opcheck(triton.forward_op.op, (*given, "gelu", True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    given = inputs(2, 3, 4, 2)
    compiled = torch.compile(lambda **t: token_mlp(**t, backend=backend), fullgraph=True, backend="aot_eager")
    assert error(compiled(**given), token_mlp(**given, backend=backend)) < 1e-6


MUTANTS = [
    ("mask=(m < M)[:, None] & (k < K)[None, :]", "mask=(m < M)[:, None] & (k < K - 1)[None, :]"),
    ("total = dot(a, x, PRECISION, total)", "total = dot(a, x, PRECISION)"),
    ("total += tl.load(bias_ptr", "total -= tl.load(bias_ptr"),
    ("x_ptr + b * x_b", "x_ptr + b * M * channels"),
    ("k[None, :] * a_k", "k[None, :]"),
    ("total *= activation_slope(z, ACTIVATION)", "total *= 1.0"),
    ("channels, activate(z, ACTIVATION))", "channels, z)"),
    ("dw = dot(g, tl.trans(x), PRECISION, dw)", "dw = dot(g, tl.trans(x), PRECISION)"),
    ("db += tl.sum", "db = tl.sum"),
    ("samples, SPLITS)", "samples - 1, SPLITS)"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    given = inputs(2, 35, 5, 40)
    given["w1"] = skewed(given["w1"])
    with mutated("token_mlp", old, new, tmp_path):
        assert not agrees(lambda: compare(token_mlp, given, "triton"))


def test_mistakes_are_named():
    given = inputs(2, 3, 4, 2)
    with pytest.raises(ConfigError, match='Did you mean "gelu"'):
        token_mlp(**given, activation="gelo")
    with pytest.raises(ConfigError, match="b1 has shape"):
        token_mlp(**{**given, "b1": torch.zeros(3)})
    with pytest.raises(ConfigError, match="x has shape"):
        token_mlp(**{**given, "x": torch.zeros(2, 4, 2)})
    with pytest.raises(ConfigError, match="float64"):
        token_mlp(**{k: v.double() for k, v in given.items()}, backend="triton")

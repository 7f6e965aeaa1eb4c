"""token_linear equals a linear layer on the transposed tokens, by whichever product it chooses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import token_linear


# (B, M, N, C): the last ones have matrices large beside the tokens, and move all samples side by side
@pytest.mark.parametrize("size", [(3, 7, 5, 4), (1, 1, 1, 1), (2, 41, 63, 2), (3, 100, 6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_a_linear_layer(size, dtype, trained) -> None:
    torch.manual_seed(0)
    batch, out, tokens, channels = size
    weight = torch.randn(out, tokens, dtype=dtype, requires_grad=trained)
    bias, x = torch.randn(out, dtype=dtype, requires_grad=True), torch.randn(batch, tokens, channels, dtype=dtype)
    x.requires_grad_()
    y = token_linear(x, weight, bias)
    wide = y.grad_fn is not None and "Baddbmm" not in type(y.grad_fn).__name__
    assert wide == (out > (4 if trained else 16) * channels)
    inputs = [t for t in (weight, bias, x) if t.requires_grad]
    cotangent = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (weight, bias, x)]
    expected = F.linear(exact[2].mT, exact[0], exact[1]).mT
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    ours = (y, *torch.autograd.grad(y, inputs, cotangent))
    grads = torch.autograd.grad(expected, [t for t in exact if t.requires_grad], cotangent.double())
    for a, b in zip(ours, (expected, *grads), strict=True):
        assert float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) < limit


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_gradcheck(backend) -> None:
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (4, 5), (4,))]
    assert torch.autograd.gradcheck(lambda *t: token_linear(*t, backend=backend), given)
    assert torch.autograd.gradgradcheck(lambda *t: token_linear(*t, backend=backend), given)


def test_the_variable_for_all_kernels_is_honoured(monkeypatch) -> None:
    x, weight, bias = torch.randn(2, 5, 3), torch.randn(4, 5), torch.randn(4)
    nodes = {}
    for name in ("reference", "eager", "triton"):
        monkeypatch.setenv("MIXERZOO_KERNELS", name)
        nodes[name] = type(token_linear(x, weight.requires_grad_(), bias).grad_fn).__name__
    assert nodes["eager"] == nodes["triton"] == "BaddbmmBackward0"
    assert nodes["reference"] == "TransposeBackward0"
    with pytest.raises(ConfigError, match="bias"):
        token_linear(x, weight, bias[:3])

"""dense_attention equals its formula: outputs, gradients and their gradients, with shared heads, masks and biases."""

from __future__ import annotations

import functools

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import dense_attention
from mixerzoo.kernels.dense_attention import eager
from mixerzoo.tests.kernels.utils import TOLERANCE, error, run, widen


def inputs(dtype: torch.dtype = torch.float32, *, groups: int = 4, queries: int = 7, keys: int = 9):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 4, queries, 8), "k": (2, groups, keys, 8), "v": (2, groups, keys, 8)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def formula(q, k, v, bias=None, causal=False):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    if causal:
        bias = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if bias is not None:
        scores = torch.where(bias, scores, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)


def biases(kind: str):
    if kind in ("none", "causal"):
        return {"causal": kind == "causal"}
    numbers = torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(1))
    seen = numbers > 0
    seen[..., 0] = True
    return {"bias": seen if kind == "mask" else numbers}


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("kind", ["none", "causal", "mask", "numbers"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_its_formula(backend, kind, groups) -> None:
    given, options = inputs(groups=groups), biases(kind)
    ours = run(functools.partial(dense_attention, backend=backend, **options), given)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    for name, value in run(functools.partial(formula, **wide), widen(given)).items():
        assert error(ours[name], value) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("kind", ["none", "causal", "mask"])
def test_gradients_of_gradients(kind) -> None:
    # one channel a head: the check takes every number by itself
    given = [x[..., :1].clone().requires_grad_() for x in inputs(torch.float64, groups=2).values()]
    attend = functools.partial(dense_attention, **biases(kind))
    assert torch.autograd.gradcheck(attend, given)
    assert torch.autograd.gradgradcheck(attend, given)


def test_transforms_and_opcheck() -> None:
    q, k, v = inputs(torch.float64).values()
    each = torch.func.vmap(lambda *x: dense_attention(*(t[None] for t in x))[0])(q, k, v)
    torch.testing.assert_close(each, formula(q, k, v))
    tangent, step = torch.randn_like(q), 1e-6
    ours = torch.func.jvp(lambda q: dense_attention(q, k, v), (q,), (tangent,))[1]
    theirs = (formula(q + step * tangent, k, v) - formula(q - step * tangent, k, v)) / (2 * step)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(eager._op.op, (*leaves, None, True))


def test_arguments_that_do_not_fit() -> None:
    q, k, v = inputs(groups=3).values()
    with pytest.raises(ConfigError, match="heads"):
        dense_attention(q, k, v)
    q, k, v = inputs().values()
    with pytest.raises(ConfigError, match="causal"):
        dense_attention(q, k, v, torch.ones(7, 9, dtype=torch.bool), causal=True)

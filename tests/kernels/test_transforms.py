"""Every op under forward-mode differentiation, `torch.func`, tracing and export, and gradients of its gradients.

PyTorch passes over an operator without a rule in silence (tangents of 0) or with an internal error; here they take the
plain path (`dispatch.wants_plain`). What is right follows from the ordinary gradient and from the definition.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.common.dispatch import wants_plain
from mixerzoo.kernels.selftest.case import Draw
from mixerzoo.kernels.selftest.comparison import error, is_float, widen
from torch import Tensor
from torch.autograd import forward_ad

OPS = find_ops()
SMALL = {"L": 7, "H": 2, "K": 3, "V": 2}  # an odd length over several blocks is not what matters here


def problem(op: str, dtype: torch.dtype = torch.float64) -> tuple[Any, tuple[Tensor, ...]]:
    """The op as a function of its floating inputs with one output, and these inputs."""
    case = OPS[op]
    dims = {**case.odd[0], **{k: v for k, v in SMALL.items() if k in case.odd[0]}}
    if "G" in dims and "H" in dims:
        dims["G"] = 1
    inputs: dict[str, Any] = widen(case.inputs(Draw(dtype=torch.float32), **dims), dtype)
    leaves = {k: v for k, v in inputs.items() if is_float(v)}

    def function(*tensors: Tensor, backend: str = "auto") -> Tensor:
        made = case.run(**inputs | dict(zip(leaves, tensors, strict=True)), backend=backend)
        made = made if isinstance(made, tuple) else (made,)
        made = [torch.view_as_real(y) if y.is_complex() else y for y in made]
        return torch.cat([y.double().flatten() for y in made])

    return function, tuple(leaves.values())


def randoms(*like: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in like)


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of what real and imaginary parts are made of."""
    return float((a.conj() * b).real.sum())


@pytest.mark.parametrize("op", OPS)
def test_tangents_and_gradients_agree(op):
    """<w, J t> = <J^T w, t>, and J^T is that of the ordinary operator."""
    function, x = problem(op)
    t = randoms(*x)
    leaves = tuple(v.detach().requires_grad_() for v in x)
    y = function(*leaves)
    (w,) = randoms(y, seed=2)
    grads = torch.autograd.grad(y, leaves, w, allow_unused=True, materialize_grads=True)
    expected = sum(dot(g, v) for g, v in zip(grads, t, strict=True))
    ours, tangent = torch.func.jvp(function, x, t)
    scale = max(sum(abs(dot(g, v)) for g, v in zip(grads, t, strict=True)), 1.0)
    assert error(ours, y) < 1e-10
    assert abs(dot(w, tangent) - expected) < 1e-9 * scale
    assert tangent.abs().sum() > 0
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(v, d) for v, d in zip(x, t, strict=True)))
        assert error(forward_ad.unpack_dual(dual).tangent, tangent) < 1e-12
    pulled = torch.func.vjp(function, *x)[1](w)
    for ours, theirs in zip(pulled, grads, strict=True):
        assert error(ours, theirs) < 1e-9


@pytest.mark.parametrize("op", OPS)
def test_per_sample_gradients(op):
    """`vmap(grad)` over a new axis is a loop over it."""
    function, x = problem(op, torch.float32)
    several = tuple(torch.stack([v, v.flip(0)]) if v.shape[0] > 1 else torch.stack([v, 2 * v]) for v in x)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    places = tuple(range(len(x)))
    ours = torch.func.vmap(torch.func.grad(loss, argnums=places))(*several)
    for i in range(2):
        leaves = tuple(v[i].detach().requires_grad_() for v in several)
        wanted = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True, materialize_grads=True)
        for a, b in zip(ours, wanted, strict=True):
            assert error(a[i], b) < 1e-4


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients(op):
    """Those of a gradient penalty, against those of the definition."""
    function, x = problem(op)

    def penalty(backend: str) -> tuple[Tensor, ...]:
        leaves = tuple(v.detach().requires_grad_() for v in x)
        y = function(*leaves, backend=backend)
        (w,) = randoms(y, seed=2)
        grads = torch.autograd.grad((y * w).tanh().sum(), leaves, create_graph=True, allow_unused=True)
        total = sum((g.conj() * g).real.sum() for g in grads if g is not None)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for ours, theirs in zip(penalty("auto"), penalty("reference"), strict=True):
        assert error(ours, theirs) < 1e-8 or (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("op", ["pool_mix", "shift", "gla", "selective_scan"])
def test_triton_by_name_refuses_what_it_cannot_do(op):
    pytest.importorskip("triton")
    function, x = problem(op, torch.float32)
    with pytest.raises(NotImplementedError, match=r'has no forward-mode derivative .* backend="reference"'):
        torch.func.jvp(lambda *v: function(*v, backend="triton"), x, randoms(*x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", OPS)
def test_traced_and_exported_without_our_operators(op):
    function, x = problem(op, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    traced = torch.jit.trace(Module(), x, check_trace=False)
    assert "mixerzoo::" not in str(traced.inlined_graph)
    exported = torch.export.export(Module(), x)
    assert "mixerzoo" not in str(exported.graph_module.code)
    wanted = function(*x)
    for module in (traced, exported.module()):
        assert error(module(*x), wanted) < 2e-5


def test_compiled_code_keeps_the_operators():
    """PyTorch 2.10 says of everything that it compiles that it exports it: kernels would be left out, silently."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x + 1, wants_plain()), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2))[1] is False

"""spectral_filter: every path against the reference, in every memory layout."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import spectral_filter
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated, skewed
from torch import Tensor

BACKENDS = ["reference", "eager", "triton"]


def modes(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


LAYOUTS = {
    "contiguous": lambda: modes(2, 7, 5, 9),
    "modes innermost": lambda: modes(2, 9, 5, 7).permute(0, 3, 2, 1),
    "batch innermost": lambda: modes(7, 5, 9, 3).movedim(-1, 0),
    "strided": lambda: skewed(modes(2, 7, 5, 9)),
    "conjugated": lambda: modes(2, 7, 5, 9).conj(),
    "one": lambda: modes(1, 1, 1),
    "long": lambda: modes(3, 41, 13),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form(backend):
    x, w = torch.tensor([[[1 + 2j]], [[3j]]]), torch.tensor([[2 - 1j]])
    assert spectral_filter(x, w, backend=backend).flatten().tolist() == [4 + 3j, 3 + 6j]


def test_reference_gradients():
    check_reference(spectral_filter, {"x": modes(2, 3, 2), "w": modes(3, 2)})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_equals_the_reference(backend, shared, layout):
    x = LAYOUTS[layout]()
    compare(spectral_filter, {"x": x, "w": modes(*x.shape[shared:])}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, w = modes(0, 3, 2).requires_grad_(), modes(3, 2).requires_grad_()
    spectral_filter(x, w, backend=backend).abs().sum().backward()
    assert w.grad is not None
    assert not w.grad.abs().any()


def test_opcheck():
    from mixerzoo.kernels.spectral_filter import triton

    torch.library.opcheck(
        triton.spectral_filter_triton.op, (modes(2, 3, 2).requires_grad_(), modes(3, 2).requires_grad_())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    x, w = modes(2, 3, 2), modes(3, 2)
    compiled = torch.compile(lambda x, w: spectral_filter(x, w, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), spectral_filter(x, w, backend=backend))


MUTANTS = [
    ("real * w_real - imag * w_imag", "real * w_real + imag * w_imag"),
    ("g_imag * w_real - g_real * w_imag", "g_imag * w_real + g_real * w_imag"),
    ("real * g_imag - imag * g_real", "real * g_imag + imag * g_real"),
    ("dw_real += one_real", "dw_real = one_real"),
    ("(p < places)[:, None], other", "(p < places - 1)[:, None], other"),
    ("t.stride() == strides:", "True:"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    x = modes(2, 9, 5, 7).permute(0, 3, 2, 1)
    with mutated("spectral_filter", old, new, tmp_path):
        assert not agrees(lambda: compare(spectral_filter, {"x": x, "w": modes(7, 5, 9)}, "triton"))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="w has shape"):
        spectral_filter(modes(2, 3, 2), modes(2, 2))
    with pytest.raises(ConfigError, match="must be complex"):
        spectral_filter(modes(2, 3, 2), torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="complex64"):
        spectral_filter(modes(2, 3, 2).to(torch.complex128), modes(3, 2).to(torch.complex128), backend="triton")

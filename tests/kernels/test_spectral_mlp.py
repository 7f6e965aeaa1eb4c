"""spectral_mlp: AFNO's official numbers, and every path against the reference, in every memory layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import spectral_mlp
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, error, mutated, skewed
from mixerzoo.tests.utils import load_golden, relative_error
from torch import Tensor

BACKENDS = ["reference", "eager", "triton"]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu"]
GENERATOR = torch.Generator()


def modes(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=GENERATOR.manual_seed(0))


def inputs(x: Tensor, blocks: int, hidden: int) -> dict[str, Tensor]:
    """x with random weights of about unit gain."""
    width = x.shape[-1] // blocks
    shapes = {"w1": (width, hidden), "b1": (hidden,), "w2": (hidden, width), "b2": (width,)}
    GENERATOR.manual_seed(1)
    found = {k: torch.randn(2, blocks, *s, generator=GENERATOR) for k, s in shapes.items()}
    found["w1"] /= width**0.5
    found["w2"] /= hidden**0.5
    return {"x": x} | found


LAYOUTS = {
    "contiguous": lambda: modes(2, 7, 5, 6),
    "modes innermost": lambda: modes(2, 6, 5, 7).permute(0, 3, 2, 1),
    "batch innermost": lambda: modes(7, 5, 6, 3).movedim(-1, 0),
    "strided": lambda: skewed(modes(2, 7, 5, 6)),
    "conjugated": lambda: modes(2, 7, 5, 6).conj(),
    "sequence": lambda: modes(2, 41, 6),
    "one mode": lambda: modes(1, 1, 6),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form(backend):
    x = torch.tensor([[[1 + 2j]]])
    w1, b1 = torch.tensor([1.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0.5, -0.5]).view(2, 1, 1)
    w2, b2 = torch.tensor([2.0, 0.0]).view(2, 1, 1, 1), torch.tensor([0.0, -5.1]).view(2, 1, 1)
    # (1 + 2i)(1 + i) + 0.5 - 0.5i = -0.5 + 2.5i; relu 2.5i; times 2, minus 5.1i: -0.1i
    y = spectral_mlp(x, w1, b1, w2, b2, threshold=0.04, backend=backend)
    assert error(y, torch.tensor([[[-0.06j]]])) < 1e-5
    y = spectral_mlp(x, w1, b1, w2, b2, threshold=0.2, backend=backend)
    assert y.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    golden = load_golden("afno2d")
    (height, width), params = golden.json("call_kwargs")["spatial_size"], golden.params
    threshold = golden.kwargs.get("sparsity_threshold", 0.01)
    leaves = {k: golden.params[k].clone().requires_grad_() for k in ("w1", "b1", "w2", "b2")}
    x = golden["input"].clone().requires_grad_()
    grid = x.unflatten(1, (height, width))
    y = spectral_mlp(torch.fft.rfft2(grid, dim=(1, 2), norm="ortho"), **leaves, threshold=threshold, backend=backend)
    y = torch.fft.irfft2(y, s=(height, width), dim=(1, 2), norm="ortho").flatten(1, 2) + x
    assert relative_error(y, golden["output"]) < 1e-5
    grads = torch.autograd.grad(y, (x, *leaves.values()), golden["cotangent"])
    assert relative_error(grads[0], golden["grad.input"]) < 2e-5
    for name, grad in zip(leaves, grads[1:], strict=True):
        assert relative_error(grad, golden[f"grad.param.{name}"]) < 2e-5
    assert set(params) == set(leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradients(activation):
    check_reference(spectral_mlp, inputs(modes(1, 3, 4), 2, 3), activation=activation, threshold=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_layouts(backend, layout):
    x = LAYOUTS[layout]()
    given = inputs(x, 3, 5)
    compare(spectral_mlp, given, backend, threshold=0.3)
    if x.stride() == torch.empty_like(x).stride() and not x.is_conj():
        assert spectral_mlp(**given, backend=backend).stride() == x.stride(), "the layout is kept"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_activations(backend, activation):
    compare(spectral_mlp, inputs(modes(1, 9, 6), 2, 4), backend, activation=activation, threshold=0.0)


@pytest.mark.parametrize(("width", "hidden"), [(20, 17), (40, 70), (70, 3)])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_widths(backend, width, hidden):
    compare(spectral_mlp, inputs(modes(1, 20, 2 * width), 2, hidden), backend, threshold=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (16, 16), (33, 16), (64, 64), (96, 96), (128, 20)])
def test_triton_everywhere(width, hidden, layout, activation):
    shape, inner = ((2, 7, 5, 3 * width), layout == "modes innermost")
    x = modes(2, 3 * width, 5, 7).permute(0, 3, 2, 1) if inner else modes(*shape)
    compare(spectral_mlp, inputs(x, 3, hidden), "triton", activation=activation, threshold=0.2)


def test_many_modes_in_cache_sized_parts():
    compare(spectral_mlp, inputs(modes(2, 150, 4), 2, 3), "eager", threshold=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_of_zero_lets_the_gradient_of_zeros_through(backend):
    given = inputs(modes(1, 3, 4), 2, 3)
    given["w2"], given["b2"] = torch.zeros_like(given["w2"]).requires_grad_(), torch.zeros_like(given["b2"])
    torch.view_as_real(spectral_mlp(**given, threshold=0.0, backend=backend)).sum().backward()
    assert given["w2"].grad is not None
    assert given["w2"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    given = {k: t.requires_grad_() for k, t in inputs(modes(0, 3, 4), 2, 3).items()}
    spectral_mlp(**given, backend=backend).abs().sum().backward()
    assert given["w1"].grad is not None
    assert not given["w1"].grad.any()


def test_opcheck():
    from mixerzoo.kernels.spectral_mlp import eager, triton

    x, *weights = (t.requires_grad_() for t in inputs(modes(1, 3, 4), 2, 3).values())
    torch.library.opcheck(triton.forward_op.op, (x, *weights, "relu", 0.1))
    joined = [torch.complex(w[0], w[1]).detach().requires_grad_() for w in weights]
    torch.library.opcheck(eager.forward_op.op, (x, *joined, "relu", 0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    given = inputs(modes(1, 3, 4), 2, 3)
    compiled = torch.compile(lambda **t: spectral_mlp(**t, backend=backend), fullgraph=True, backend="aot_eager")
    assert error(compiled(**given), spectral_mlp(**given, backend=backend)) < 1e-6


def test_large_blocks_go_to_library_products():
    given = inputs(modes(1, 2, 200), 1, 3)
    with pytest.raises(ConfigError, match="up to 128 channels"):
        spectral_mlp(**given, backend="triton")
    assert error(spectral_mlp(**given), spectral_mlp(**given, backend="reference")) < 1e-5


MUTANTS = [
    ("return r // modes * x_b", "return r // modes * x_m"),
    ("r % modes * x_m, r < count", "r % modes * x_m, r < count - 1"),
    ("dot_by_16(-x_imag[i]", "dot_by_16(x_imag[i]"),
    ("v - threshold, tl.where", "v, tl.where"),
    ("dw2_imag = dot(tl.trans(-a_imag), g_real, PRECISION, dw2_imag)", "dw2_imag = dw2_imag"),
    ("db1_real += tl.sum", "db1_real = tl.sum"),
    ("d_real *= activation_slope(z_real, ACTIVATION)", "d_real *= 1.0"),
    ("g_real = tl.where(tl.abs(y) > threshold, g_real, 0.0)", "g_real = g_real"),
    ("PRECISION, dw1_real)\n        dw1_real", "PRECISION)\n        dw1_real"),
    ("db1_ptr + at_h + blocks * hidden", "db1_ptr + at_h + hidden"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    given = inputs(modes(2, 6, 20).mT, 2, 4)  # modes innermost: the stride of samples counts, too
    with mutated("spectral_mlp", old, new, tmp_path, files=("triton_tiles", "triton")):
        assert not agrees(lambda: compare(spectral_mlp, given, "triton", threshold=0.3))


def test_reference_shrinkage_is_torch_s():
    x = torch.randn(5, 5)
    from mixerzoo.kernels.spectral_mlp.reference import _shrink

    assert torch.equal(_shrink(x, 0.5), F.softshrink(x, 0.5))


def test_mistakes_are_named():
    given = inputs(modes(1, 3, 4), 2, 3)
    with pytest.raises(ConfigError, match='Did you mean "relu"'):
        spectral_mlp(**given, activation="rulu")
    with pytest.raises(ConfigError, match="threshold=-1"):
        spectral_mlp(**given, threshold=-1)
    with pytest.raises(ConfigError, match="w1 must be"):
        spectral_mlp(**{**given, "x": modes(1, 3, 5)})
    with pytest.raises(ConfigError, match="b2 has shape"):
        spectral_mlp(**{**given, "b2": given["b1"]})

"""The Fourier family against the official implementations, closed forms and reduced precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.benchmarks.afno import measure, straightforward
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.spectral.fourier import AFF, AFNO, FNet, GlobalFilter
from mixerzoo.mixers.spectral.spectrum import from_modes, low_modes, to_modes
from mixerzoo.tests.utils import check_golden, load_golden, relative_error
from mixerzoo.training.cost import measure_activation_bytes, measure_flops
from torch import nn
from transformers.activations import ACT2FN


def _grid(golden):
    given = golden.json("call_kwargs", {}).get("spatial_size")
    side = math.isqrt(golden["input"].shape[1])
    return tuple(given or (side, side))


@pytest.mark.parametrize("name", ["afno2d", "afno2d_hsf", "afno2d_hardthresh"])
def test_golden_afno_2d(name):
    golden = load_golden(name)
    options = dict(golden.kwargs)
    grid = _grid(golden)
    mixer = AFNO(options.pop("hidden_size"), kept_modes="official", **options)
    check_golden(
        golden,
        mixer,
        AFNO.convert_official,
        to_ours=lambda x: x.unflatten(1, grid),
        to_theirs=lambda y: y.flatten(1, 2),
    )


def test_golden_afno_1d():
    golden = load_golden("afno1d")
    options = dict(golden.kwargs)
    check_golden(golden, AFNO(options.pop("hidden_size"), **options), AFNO.convert_official)


def test_golden_global_filter():
    golden = load_golden("globalfilter")
    grid = _grid(golden)
    check_golden(
        golden,
        GlobalFilter(golden.kwargs["dim"], grid=grid),
        GlobalFilter.convert_official,
        to_ours=lambda x: x.unflatten(1, grid),
        to_theirs=lambda y: y.flatten(1, 2),
    )


@pytest.mark.parametrize("name", ["aff_mixer", "aff_mixer_swish"])
def test_golden_aff(name):
    golden = load_golden(name)
    options = dict(golden.kwargs)
    given = options.pop("opts_", {})
    if "model.activation.name" in given:
        options["activation"] = {"swish": "silu"}.get(given["model.activation.name"], given["model.activation.name"])
    if "model.activation.sparsity_threshold" in given:
        options["sparsity_threshold"] = given["model.activation.sparsity_threshold"]
    check_golden(
        golden,
        AFF(options.pop("hidden_size"), **options),
        AFF.convert_official,
        to_ours=lambda x: x.permute(0, 2, 3, 1),
        to_theirs=lambda y: y.permute(0, 3, 1, 2),
    )


def test_golden_fnet():
    golden = load_golden("fnet_mixing")
    check_golden(golden, FNet(golden.kwargs["hidden_size"]), lambda state: {})


class _FNetBlock(nn.Module):
    """Mixing, residual and norm, and with `hidden` the feed-forward half: what FNet builds around the mixer."""

    def __init__(self, dim, eps=1e-12, hidden=None, act="gelu_new"):
        super().__init__()
        self.mixer = FNet(dim)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.ff = None
        if hidden:
            self.ff = nn.Sequential(nn.Linear(dim, hidden), copy.deepcopy(ACT2FN[act]), nn.Linear(hidden, dim))
            self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x):
        x = self.norm1(x + self.mixer(x))
        return x if self.ff is None else self.norm2(x + self.ff(x))


def test_golden_fnet_block():
    golden = load_golden("fnet_fourier_block")
    block = _FNetBlock(golden.kwargs["hidden_size"])
    check_golden(golden, block, lambda s: {k.replace("output.LayerNorm", "norm1"): v for k, v in s.items()})


def test_golden_fnet_layer():
    golden = load_golden("fnet_layer")
    sizes = golden.kwargs
    block = _FNetBlock(sizes["hidden_size"], sizes["layer_norm_eps"], sizes["intermediate_size"], sizes["hidden_act"])
    names = {"fourier.output.LayerNorm": "norm1", "intermediate.dense": "ff.0", "output.dense": "ff.2"}

    def convert(state):
        out = {}
        for key, value in state.items():
            for theirs, ours in {**names, "output.LayerNorm": "norm2"}.items():
                if key.startswith(theirs + "."):
                    out[key.replace(theirs, ours)] = value
                    break
        return out

    golden.tensors["input"] = golden["input.hidden_states"]
    golden.tensors["grad.input"] = golden["grad.input.hidden_states"]
    check_golden(golden, block, convert)
    x = golden["input.hidden_states"]
    assert relative_error(block.mixer(x), golden["output.fourier"]) < 1e-5


# -- transforms


@pytest.mark.parametrize(
    "grid", [(1,), (7,), (8,), (5, 6), (6, 5), (1, 4), (2, 3, 5), (4, 2, 6), (256,), (16, 32), (4, 8, 8)]
)
def test_transforms_are_those_of_torch(grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    axes = tuple(range(1, x.ndim - 1))
    z = to_modes(x)
    torch.testing.assert_close(z, torch.fft.rfftn(x, dim=axes, norm="ortho"))
    torch.testing.assert_close(from_modes(z, grid), x)


@pytest.mark.parametrize("grid", [(9,), (8,), (6, 7), (7, 8), (4, 5, 6)])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_cut_frequencies_are_the_high_ones(grid, fraction):
    """Against a mask on the whole spectrum, and: what remains of a real map is a real map."""
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    kept = [low_modes(n, fraction) for n in grid]
    axes = tuple(range(1, x.ndim - 1))
    full = torch.fft.fftn(x, dim=axes, norm="ortho")
    for axis, (n, count) in enumerate(zip(grid, kept, strict=True), start=1):
        index = torch.arange(n)
        low = torch.minimum(index, n - index) < count
        full = full * low.view([-1 if a == axis else 1 for a in range(x.ndim)])
    expected = torch.fft.ifftn(full, dim=axes, norm="ortho")
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(from_modes(to_modes(x, kept), grid), expected.real)


@pytest.mark.parametrize("shape", [(2, 7, 10), (2, 8, 9), (1, 5, 6, 7), (2, 3, 4, 2, 8), (1, 4, 1), (1, 1, 2)])
def test_fnet_closed_form(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    axes = tuple(range(1, len(shape)))
    torch.testing.assert_close(FNet(shape[-1])(x), torch.fft.fftn(x, dim=axes).real)
    torch.testing.assert_close(FNet(shape[-1], norm="ortho")(x), torch.fft.fftn(x, dim=axes, norm="ortho").real)
    assert torch.autograd.gradcheck(FNet(shape[-1]), (x,))
    assert torch.autograd.gradgradcheck(FNet(shape[-1]), (x,))


@pytest.mark.parametrize(
    ("grid", "kept"),
    [((5,), None), ((6,), None), ((6,), (2,)), ((1,), None), ((4, 5), (2, None)), ((5, 4), None)],
)
def test_gradients_of_transforms(grid, kept):
    x = torch.randn(1, *grid, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: to_modes(t, kept), (x,))
    assert torch.autograd.gradgradcheck(lambda t: to_modes(t, kept).abs().square(), (x,))
    z = to_modes(x, kept).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: from_modes(t, grid), (z,))


def test_layout_of_large_grids():
    """From 256 tokens on the result is transposed in a path of its own; its gradient is that of torch's transform."""
    x = torch.randn(2, 16, 16, 3, requires_grad=True)
    cotangent = torch.randn_like(x)
    z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * (1 + 2j)
    expected = torch.fft.irfft2(z, s=(16, 16), dim=(1, 2), norm="ortho")
    y = from_modes(to_modes(x) * (1 + 2j), (16, 16))
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    (expected_grad,) = torch.autograd.grad(expected, x, cotangent)
    torch.testing.assert_close(grad, expected_grad)


# -- AFNO


@pytest.mark.parametrize("grid", [(9,), (6, 7), (3, 4, 5)])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_afno_gradients(grid, fraction):
    mixer = AFNO(4, num_blocks=2, hard_thresholding_fraction=fraction, sparsity_threshold=0.0).double()
    x = torch.randn(1, *grid, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,))


def test_official_rule_keeps_too_much_on_images():
    """The fault that `kept_modes="per_axis"` mends: half of the frequencies asked for, all of them kept."""
    official = AFNO(8, hard_thresholding_fraction=0.5, kept_modes="official")
    mended = AFNO(8, hard_thresholding_fraction=0.5)
    assert official.kept((14, 14)) == [None, 49]  # of 8
    assert mended.kept((14, 14)) == [4, 4]
    whole = AFNO(8)
    for other in (official, mended):
        other.load_state_dict(whole.state_dict())
    x = torch.randn(1, 14, 14, 8)
    assert torch.equal(official(x), whole(x))
    assert not torch.allclose(mended(x), whole(x), atol=1e-4)
    sequence = torch.randn(1, 15, 8)
    torch.testing.assert_close(official(sequence), mended(sequence))


def test_official_rule_may_keep_nothing():
    x = torch.randn(1, 3, 2, 8)
    mixer = AFNO(8, hard_thresholding_fraction=0.1, kept_modes="official")
    assert torch.equal(mixer(x), x)
    assert not torch.equal(AFNO(8, hard_thresholding_fraction=0.1)(x), x)  # the mean is always kept


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("afno", {"num_blocks": 5}, "nearest that does is 4"),
        ("aff", {"num_blocks": 0}, "num_blocks"),
        ("afno", {"hard_thresholding_fraction": 1.5}, "at least 0 and at most 1"),
        ("afno", {"sparsity_threshold": -0.1}, "at least 0"),
        ("aff", {"hidden_size_factor": 0}, "hidden_size_factor: 0 must be at least 1"),
        ("afno", {"kept_modes": "offical"}, "kept_modes"),
        ("fnet", {"norm": "none"}, "norm"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_mixer(name, 32, **options)


# -- precision

FFT_MIXERS = [("fnet", {"norm": "ortho"}), ("global_filter", {}), ("afno", {}), ("aff", {})]


@pytest.mark.parametrize(("name", "options"), FFT_MIXERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [(14, 14), (7, 14)])
def test_autocast_computes_in_float32(name, options, dtype, grid):
    """14 is no power of two, which half-precision FFTs need. Autocast changes nothing: the input is float32."""
    mixer = create_mixer(name, 16, grid=grid, **options)
    x = torch.randn(2, *grid, 16, requires_grad=True)
    expected = mixer(x)
    with torch.autocast("cpu", dtype):
        y = mixer(x)
        half = mixer(x.to(dtype)).detach()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, expected_grad)
    assert half.dtype == dtype  # one rounding of the input and one of the result
    assert relative_error(half, expected.detach()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("name", "options"), FFT_MIXERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters(name, options, dtype):
    mixer = create_mixer(name, 16, grid=(5, 7), **options)
    x = torch.randn(2, 5, 7, 16)
    low = create_mixer(name, 16, grid=(5, 7), **options).to(dtype)
    low.load_state_dict({k: v.to(dtype) for k, v in mixer.state_dict().items()})
    y = low(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y.detach(), mixer(x).detach()) < 8 * torch.finfo(dtype).eps


# -- resolution


def test_filter_keeps_its_kernel_on_a_larger_grid():
    """A filter whose kernel spans 3 tokens is the same convolution on every grid."""
    kernel = torch.randn(3, 3, 4)

    def weight(grid):
        taps = torch.zeros(*grid, 4)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                taps[i % grid[0], j % grid[1]] = kernel[i + 1, j + 1]
        return torch.view_as_real(torch.fft.rfft2(taps, dim=(0, 1)))

    mixer = GlobalFilter(4, grid=(5, 6))
    mixer.load_state_dict({"complex_weight": weight((5, 6))})
    for grid in [(8, 9), (9, 7), (5, 8), (4, 5)]:
        mixer.resize_grid(grid)
        torch.testing.assert_close(mixer.complex_weight.detach(), weight(grid), rtol=1e-4, atol=1e-5)
        x = torch.randn(1, *grid, 4)
        wrapped = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="circular")
        expected = F.conv2d(wrapped, kernel.flip(0, 1).permute(2, 0, 1)[:, None], groups=4).permute(0, 2, 3, 1)
        torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(6,), (6, 5), (5, 6), (2, 4, 3)])
def test_filter_there_and_back(grid):
    mixer = GlobalFilter(4, grid=grid)
    x = torch.randn(1, *grid, 4)
    before = mixer(x)
    mixer.resize_grid(tuple(n + 3 for n in grid))
    assert mixer.grid == tuple(n + 3 for n in grid)
    mixer.resize_grid(grid)
    torch.testing.assert_close(mixer(x), before, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="cannot be resized"):
        mixer.resize_grid((*grid, 2))


# -- cost


@pytest.mark.parametrize(("name", "options"), FFT_MIXERS)
def test_cost_grows_as_n_log_n(name, options):
    small, large = (8, 8), (32, 32)
    costs = []
    for grid in (small, large):
        mixer = create_mixer(name, 16, grid=grid, **options)
        x = torch.randn(1, *grid, 16)
        costs.append((measure_flops(mixer, x), measure_activation_bytes(mixer, x)))
    flops, memory = costs[1][0] / costs[0][0], costs[1][1] / max(1, costs[0][1])
    growth = 16 * math.log2(1024) / math.log2(64)  # n log n from 64 to 1024 tokens: 26.7
    assert 14 < flops <= 1.05 * growth
    assert memory <= 16.5  # linear; FNet keeps nothing at all


def test_benchmark_compares_equals():
    result = measure((6, 5), 16, 1, 3)
    assert result["memory"]["ours_bytes"] < result["memory"]["baseline_bytes"]
    mixer = AFNO(16)
    x = torch.randn(2, 6, 5, 16)
    torch.testing.assert_close(straightforward(mixer, x), mixer(x), rtol=1e-4, atol=1e-5)

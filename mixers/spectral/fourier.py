"""The Fourier family: FNet, the global filter of GFNet, AFNO and the adaptive frequency filter of AFFNet.

Axis letters: B batch, N tokens, C channels, K blocks of channels, c = C / K channels and h hidden channels of a block.
`*grid` is (N,), (H, W) or (T, H, W); `*modes` is the grid with its last axis n replaced by n // 2 + 1 frequencies.

FFTs and everything between them run in float32 whatever autocast says (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ...kernels import spectral_filter, spectral_mlp
from ...schema import Fraction, NonNegative, Size
from ..base import Grid, Mixer
from ..layers import full_precision
from ..resize import resize_spectral_weight
from .spectrum import from_modes, low_modes, to_modes


def _real_fourier(x: Tensor, ortho: bool) -> Tensor:
    """Real part of the DFT over grid and channels; half of it is computed, the rest mirrored."""
    axes = tuple(range(1, x.ndim))
    half = torch.fft.rfftn(x, dim=axes, norm="ortho" if ortho else "backward").real
    mirrored = half[..., 1 : (x.shape[-1] + 1) // 2].flip(axes).roll([1] * (x.ndim - 2), axes[:-1])
    return torch.cat([half, mirrored], -1)


class _RealFourier(torch.autograd.Function):
    """The map is symmetric, so its gradient is the map itself; without this, autograd takes complex transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, ortho: bool) -> Tensor:
        return _real_fourier(x, ortho)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.ortho = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return _real_fourier(tangent, ctx.ortho)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _RealFourier.apply(grad, ctx.ortho), None


class FNet(Mixer, name="fnet"):
    """The real part of the Fourier transform over tokens and channels. Lee-Thorp et al. (2021), arXiv:2105.03824.

    `y = Re(DFT_grid(DFT_channels(x)))`, without parameters. For images and video all grid axes are transformed.

    Args:
        dim: number of channels C.
        norm: "backward" does not scale, as published: values grow by about sqrt(N C), which suits the published block,
            where a norm follows the residual sum. "ortho" divides by sqrt(N C) and suits blocks whose norm comes first,
            where the unscaled mixer would drown the identity path.

    Shapes: `x` and the result `(B, *grid, C)`.

    Raises:
        ConfigError: a mask, which the transform cannot honour.
    """

    complexity = "N log N"
    source = "FNet: Mixing Tokens with Fourier Transforms (2021), arXiv:2105.03824"
    equation = "y = Re(F_tokens F_channels x)"
    alternatives = {"norm": "ortho"}

    def __init__(self, dim: int, *, norm: Literal["backward", "ortho"] = "backward") -> None:
        super().__init__()
        self.ortho = norm == "ortho"

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        self.check_grid(x)
        # the compiler takes no function with a rule for vmap
        transform = _real_fourier if torch.compiler.is_compiling() else _RealFourier.apply
        return transform(full_precision(x), self.ortho).to(x.dtype)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """FNet's mixer has no parameters."""
        return {}


class GlobalFilter(Mixer, name="global_filter"):
    """A learned complex filter for every frequency and channel. GFNet: Rao et al. (2021), arXiv:2107.00645.

    `y = irDFT(rDFT(x) * F)`, a circular convolution with a kernel as large as the grid. The filter belongs to one grid;
    `resize_grid` interpolates it band-limitedly (the official code interpolates it bicubically, across the border
    between positive and negative frequencies of the first axis).

    Args:
        dim: number of channels C.
        grid: sizes of the grid.

    Shapes: `x` and the result `(B, *grid, C)`; parameter `complex_weight` `(*modes, C, 2)`, real and imaginary parts.

    Raises:
        ConfigError: a mask, or tokens of another grid.
    """

    needs_grid = True
    complexity = "N log N"
    source = "Global Filter Networks for Image Classification (2021), arXiv:2107.00645"
    equation = "y = F^-1(W * F x)"

    def __init__(self, dim: int, *, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.complex_weight = nn.Parameter(torch.empty(*grid[:-1], grid[-1] // 2 + 1, dim, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as published."""
        nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        grid = self.check_grid(x)
        z = to_modes(full_precision(x))
        w = torch.view_as_complex(self.complex_weight.to(z.real.dtype).contiguous())  # a cast of formats may stride it
        return from_modes(spectral_filter(z, w), grid).to(x.dtype)

    @torch.no_grad()
    def resize_grid(self, grid: Grid) -> None:
        """Another grid of the same rank, by spectral interpolation of the filter; see `resize_spectral_weight`."""
        old = self.complex_weight
        if self.grid is None or len(grid) != len(self.grid):
            raise ConfigError(f'mixer "{self.name}": cannot be resized from the grid {self.grid} to {tuple(grid)}.')
        w = torch.view_as_complex(full_precision(old.detach()))
        w = resize_spectral_weight(w, self.grid, tuple(grid), tuple(range(len(grid))))
        self.complex_weight = nn.Parameter(torch.view_as_real(w).to(old.dtype).contiguous(), old.requires_grad)
        self.grid = tuple(grid)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From GFNet's or AFNO's `GlobalFilter`: one tensor `complex_weight` (H, W // 2 + 1, C, 2)."""
        return {"complex_weight": state_dict["complex_weight"]}


class _SpectralMlp(Mixer):
    """What AFNO and AFF share: the block-diagonal complex MLP on frequencies, and its options."""

    complexity = "N log N"

    def __init__(
        self, dim: int, num_blocks: int, hidden_size_factor: int, sparsity_threshold: float, activation: str
    ) -> None:
        super().__init__()
        if dim % num_blocks:
            fits = [k for k in range(1, dim + 1) if dim % k == 0]
            near = min(fits, key=lambda k: abs(k - num_blocks))
            raise OptionError(
                "num_blocks", f"{num_blocks} does not divide the {dim} channels; the nearest that does is {near}."
            )
        self.threshold, self.activation = float(sparsity_threshold), activation
        width = dim // num_blocks
        hidden = width * hidden_size_factor
        self.w1 = nn.Parameter(torch.empty(2, num_blocks, width, hidden))
        self.b1 = nn.Parameter(torch.empty(2, num_blocks, hidden))
        self.w2 = nn.Parameter(torch.empty(2, num_blocks, hidden, width))
        self.b2 = nn.Parameter(torch.empty(2, num_blocks, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All normal with standard deviation 0.02, the biases too, as published."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The biases, which are vectors for every block."""
        return {"b1", "b2"}

    def mlp(self, z: Tensor) -> Tensor:
        """Complex `(B, *modes, C)` to the same shape."""
        weights = (self.w1, self.b1, self.w2, self.b2)
        return spectral_mlp(z, *weights, activation=self.activation, threshold=self.threshold)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official names and layouts are the same: w1 (2, K, c, h), b1 (2, K, h), w2 (2, K, h, c), b2 (2, K, c)."""
        return {name: state_dict[name] for name in ("w1", "b1", "w2", "b2")}


class AFNO(_SpectralMlp, name="afno"):
    """Adaptive Fourier Neural Operator: one MLP for all frequencies. Guibas et al. (2021), arXiv:2111.13587.

    `y = irDFT(shrink(relu(rDFT(x) W1 + b1) W2 + b2)) + x`, orthonormal transforms, complex block-diagonal W, ReLU and
    soft shrinkage on real and imaginary parts separately. The sum with x is part of the published mixer. Frequencies
    that are cut pass only by that sum. Any grid fits, and weights serve every resolution.

    Args:
        dim: number of channels C.
        num_blocks: blocks K of the block-diagonal weights.
        hidden_size_factor: hidden channels h of a block as a multiple of c.
        sparsity_threshold: of the soft shrinkage; 0 for none.
        hard_thresholding_fraction: part of the frequencies that is kept, per axis. In every axis the lowest
            int((n // 2 + 1) * fraction) non-negative frequencies stay, at least the mean, and the negative ones of the
            same size.
        kept_modes: "per_axis" as above. "official" is the rule of the official AFNO2D, which keeps
            int((N // 2 + 1) * fraction) frequencies of the last axis, N being the number of all tokens, and cuts no
            other axis: on images most fractions then keep everything. On sequences both rules agree.

    Shapes: `x` and the result `(B, *grid, C)`.

    Raises:
        ConfigError: `num_blocks` that does not divide `dim`, a fraction outside 0..1, or a mask.
    """

    source = "Adaptive Fourier Neural Operators (2021), arXiv:2111.13587"
    equation = "y = F^-1 shrink(relu(F x W1 + b1) W2 + b2) + x"
    alternatives = {
        "num_blocks": 4,
        "hidden_size_factor": 2,
        "sparsity_threshold": 0.0,
        "hard_thresholding_fraction": 0.5,
        "kept_modes": "official",
    }
    requires = {"kept_modes": {"hard_thresholding_fraction": 0.5}}

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: Size = 8,
        hidden_size_factor: Size = 1,
        sparsity_threshold: NonNegative = 0.01,
        hard_thresholding_fraction: Fraction = 1.0,
        kept_modes: Literal["per_axis", "official"] = "per_axis",
    ) -> None:
        super().__init__(dim, num_blocks, hidden_size_factor, sparsity_threshold, "relu")
        self.fraction = float(hard_thresholding_fraction)
        self.kept_modes = kept_modes

    def kept(self, grid: Grid) -> list[int | None] | None:
        """For every axis the number of non-negative frequencies that are kept; None where all are."""
        if self.fraction == 1.0:
            return None
        if self.kept_modes == "official":
            return [None] * (len(grid) - 1) + [int((prod(grid) // 2 + 1) * self.fraction)]
        return [low_modes(n, self.fraction) for n in grid]

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        grid = self.check_grid(x)
        kept = self.kept(grid)
        if kept is not None and kept[-1] == 0:  # the official rule may leave nothing
            return x
        with torch.autocast(x.device.type, enabled=False):
            y = from_modes(self.mlp(to_modes(full_precision(x), kept)), grid)
        return x + y.to(x.dtype)


class AFF(_SpectralMlp, name="aff"):
    """Adaptive frequency filter: an MLP of the spectrum masks the spectrum. Huang et al. (2023), arXiv:2307.14008.

    `y = irDFT(M * Z) + x`, `Z = rDFT(x)`, `M = shrink(act(Z W1 + b1) W2 + b2)`: a circular convolution whose kernel, as
    large as the grid, depends on the tokens. Transforms, MLP and shrinkage as in AFNO; the sum with x is part of the
    published mixer. Any grid fits, and weights serve every resolution.

    Args:
        dim: number of channels C.
        num_blocks: blocks K of the block-diagonal weights.
        hidden_size_factor: hidden channels h of a block as a multiple of c.
        sparsity_threshold: of the soft shrinkage; 0 for none.
        activation: of the MLP, on real and imaginary parts separately. The official mixer takes ReLU where its options
            name none; the MobileViT recipe, from which AFFNet's is derived, names SiLU.

    Shapes: `x` and the result `(B, *grid, C)`.

    Raises:
        ConfigError: `num_blocks` that does not divide `dim`, or a mask.
    """

    source = "Adaptive Frequency Filters As Efficient Global Token Mixers (2023), arXiv:2307.14008"
    equation = "y = F^-1(M * F x) + x, M = shrink(act(F x W1 + b1) W2 + b2)"
    alternatives = {"num_blocks": 4, "hidden_size_factor": 2, "sparsity_threshold": 0.0, "activation": "silu"}

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: Size = 8,
        hidden_size_factor: Size = 1,
        sparsity_threshold: NonNegative = 0.01,
        activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu",
    ) -> None:
        super().__init__(dim, num_blocks, hidden_size_factor, sparsity_threshold, activation)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        grid = self.check_grid(x)
        with torch.autocast(x.device.type, enabled=False):
            z = to_modes(full_precision(x))
            y = from_modes(spectral_filter(z, self.mlp(z)), grid)
        return x + y.to(x.dtype)

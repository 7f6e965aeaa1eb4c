"""Norms and activations by name, for channels-last tokens.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...mixers.layers import StarReLU
from ...schema import Epsilon, Fraction, Parts

NORMS = Parts("norm", __name__)
ACTIVATIONS = Parts("activation", __name__)


@NORMS.register("layer_norm")
class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each token, `(B, *grid, C)`. Ba et al. (2016), arXiv:1607.06450."""

    alternatives = {"eps": 0.1}

    def __init__(self, dim: int, *, eps: Epsilon = 1e-6, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, bias=bias)


@NORMS.register("group_norm")
class GroupNorm(nn.Module):
    """Group norm with one group: statistics of one sample over all tokens and channels, a weight per channel.

    The norm of PoolFormer (2021), arXiv:2111.11418. It mixes tokens (by two numbers), so it suits neither causal models
    nor padded batches.
    """

    mixes_tokens = True
    alternatives = {"eps": 0.1}

    def __init__(self, dim: int, *, eps: Epsilon = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def reset_parameters(self) -> None:
        """Ones and zeros."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self._fusable(x)
        return F.group_norm(x.movedim(-1, 1), 1, self.weight, self.bias, self.eps).movedim(1, -1)

    def _fusable(self, x: Tensor) -> Tensor:
        # As sums in the order in which the tokens lie, which the compiler makes faster code of than of `group_norm`.
        flat = x.flatten(1).float() if x.dtype in (torch.float16, torch.bfloat16) else x.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        normal = centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
        y = normal.view(x.shape) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}"


@NORMS.register("rms_norm")
class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over channels, without centring. Zhang and Sennrich (2019), arXiv:1910.07467."""

    alternatives = {"eps": 0.1}

    def __init__(self, dim: int, *, eps: Epsilon = 1e-6) -> None:
        super().__init__(dim, eps=eps)


@NORMS.register("batch_norm")
class BatchNorm(nn.Module):
    """Batch norm per channel over batch and grid. Ioffe and Szegedy (2015), arXiv:1502.03167."""

    mixes_batch = True
    alternatives = {"eps": 0.1, "momentum": 0.5}

    def __init__(self, dim: int, *, eps: Epsilon = 1e-5, momentum: Fraction = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(-1, x.shape[-1])).view(x.shape)


@NORMS.register("affine")
class Affine(nn.Module):
    """A scale and a shift per channel in place of a norm. ResMLP (2021), arXiv:2105.03404."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Ones and zeros."""
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


@NORMS.register("none")
class NoNorm(nn.Identity):
    """No norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()


class SquaredReLU(nn.Module):
    """`relu(x)**2`. Primer (2021), arXiv:2109.08668."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "star_relu": StarReLU,
    "squared_relu": SquaredReLU,
}
for _name, _make in _PLAIN.items():
    ACTIVATIONS.register(_name)(_make)

"""The controls: no mixing, random mixing, and average pooling.

Axis letters: B batch, N tokens, C channels, H height, W width, T frames. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ... import kernels
from ...errors import OptionError
from ...schema import Side
from ..base import Grid, Mixer
from ..positions import put_back, real_first, without_padding
from ..state import last_tokens


class Identity(Mixer, name="identity"):
    """No mixing at all: the block keeps its norm, residual and channel mixer. IdentityFormer (2022), arXiv:2210.13452.

    A control: what a model scores with this mixer, its backbone scores alone.
    """

    causal = "can"
    masks = True
    packs = True
    streams = True
    complexity = "1"
    memory = "1"
    source = "MetaFormer Baselines for Vision (2022), arXiv:2210.13452"
    equation = "y = x"

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        self.is_causal = causal

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return x

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[()]:
        return ()

    def step(self, x_t: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return x_t, state

    def prefill(
        self, x: Tensor, *, mask: Tensor | None = None, state: tuple[()] | None = None
    ) -> tuple[Tensor, tuple[()]]:
        return x, ()


class RandomMixing(Mixer, name="random"):
    """A frozen random mixing matrix, the same for all channels: `y_m = sum_n R_mn x_n`. RandFormer, arXiv:2210.13452.

    R is the row-softmax of uniform noise, drawn once and never trained; the causal form draws the softmax over the
    tokens up to m. A control: mixing without learning.

    Args:
        dim: channels C.
        grid: the token grid; R is `(N, N)` with N its number of tokens.
        causal: row m looks at tokens up to m only; the input may then be shorter than the grid.
    """

    causal = "can"
    needs_grid = True
    masks = True
    complexity = "N^2"
    memory = "N"
    source = "MetaFormer Baselines for Vision (2022), arXiv:2210.13452"
    equation = "y_m = sum_n R_mn x_n, R = softmax(noise), never trained"

    def __init__(self, dim: int, *, grid: Grid, causal: bool = False) -> None:
        super().__init__()
        self.grid, self.is_causal = grid, causal
        tokens = prod(grid)
        self.register_buffer("random_matrix", torch.empty(tokens, tokens))
        self.random_matrix: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        noise = torch.rand_like(self.random_matrix)
        if self.is_causal:
            noise = noise.masked_fill(torch.ones_like(noise).triu(1).bool(), float("-inf"))
        self.random_matrix.copy_(noise.softmax(-1))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        tokens = prod(x.shape[1:-1])
        if not (self.is_causal and x.ndim == 3 and tokens <= self.random_matrix.shape[0]):
            self.check_grid(x)
        x = without_padding(x, mask)
        matrix = self.random_matrix[:tokens, :tokens].to(x.dtype)
        return torch.matmul(matrix, x.flatten(1, -2)).view(x.shape)

    def resize_grid(self, grid: Grid) -> None:
        """A fresh matrix of the new size: there is nothing learned to interpolate."""
        if grid != self.grid:
            self.grid = grid
            self.random_matrix = self.random_matrix.new_empty(prod(grid), prod(grid))
            self.reset_parameters()

    @classmethod
    def convert_official(cls, state_dict):
        return {"random_matrix": state_dict["random_matrix"]}


class Pooling(Mixer, name="pooling"):
    """Average pooling minus the token itself. PoolFormer (2021), arXiv:2111.11418.

    The mean is over a window of side `pool_size` in every grid axis, without counting what lies outside of the grid.
    The causal form takes the mean of the last `pool_size` real tokens. No parameters.

    Args:
        dim: channels C.
        pool_size: side of the window in tokens; odd unless causal.
        causal: mean over the past only.
    """

    causal = "can"
    masks = True
    packs = True
    streams = True
    source = "MetaFormer Is Actually What You Need for Vision (2021), arXiv:2111.11418"
    equation = "y_p = mean(x_n for n in the window of p) - x_p"
    alternatives = {"pool_size": 5}

    def __init__(self, dim: int, *, pool_size: Side = 3, causal: bool = False) -> None:
        super().__init__()
        if pool_size % 2 == 0 and not causal:
            raise OptionError("pool_size", f"{pool_size} must be odd where the mixer is not causal.")
        self.dim, self.pool_size, self.is_causal = dim, pool_size, causal

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        if mask is None or not self.is_causal:
            return self._pool(without_padding(x, mask), mask, document_ids)
        x, mask, document_ids, order = real_first(x, mask, document_ids)
        return put_back(self._pool(x, mask, document_ids), order)

    def _pool(self, x: Tensor, mask: Tensor | None, document_ids: Tensor | None = None) -> Tensor:
        return kernels.pool_mix(
            x,
            pool_size=self.pool_size,
            causal=self.is_causal,
            mask=mask,
            document_ids=document_ids,
        )

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The last `pool_size - 1` tokens `(B, pool_size - 1, C)` and how many of them exist, `(B,)`."""
        past = torch.zeros(batch, self.pool_size - 1, self.dim, device=device, dtype=dtype)
        return past, torch.zeros(batch, device=device, dtype=torch.long)

    def step(self, x_t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        past, count = state
        window = torch.cat([past, x_t.unsqueeze(1)], dim=1)
        count = (count + 1).clamp_max(self.pool_size)
        mean = window.float().sum(1) / count.unsqueeze(-1)
        return mean.to(x_t.dtype) - x_t, (window[:, 1:], count)

    def prefill(
        self, x: Tensor, *, mask: Tensor | None = None, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        past, count = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        real, order, kept = x.new_ones(x.shape[:2], dtype=torch.bool), None, self.pool_size - 1
        tokens = x
        if mask is not None:
            tokens, real, _, order = real_first(x, mask)
        before = torch.arange(-kept, 0, device=x.device) >= -count[:, None]  # places of the past that hold a token
        y = self._pool(torch.cat([past.to(x.dtype), tokens], 1), torch.cat([before, real], 1))[:, kept:]
        after = last_tokens(x, kept, mask, past.to(x.dtype)), (count + real.sum(1)).clamp_max(self.pool_size)
        return (y if order is None else put_back(y, order)), after

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}, causal={self.is_causal}"

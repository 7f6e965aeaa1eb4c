"""PoNet: pooling at three granularities in place of attention.

Axis letters: B batch, N tokens, C channels, H heads, D channels per head. `*grid` is (N,), (H, W) or (T, H, W), read in
raster order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels.segment_pool import segment_pool
from ...schema import OddSize, Size
from ..base import Mixer
from ..layers import full_precision
from ..positions import document_rows, rows_apart, without_padding


class PoNet(Mixer, name="ponet"):
    """Global attention of one mean query, segment maxima and local maxima. PoNet (2021), arXiv:2110.02442.

        g = softmax(mean(Q) . K / sqrt(D)) K;   y_t = (g + segmax(S)_t) * O_t + localmax(L)_t;   out = ff(y)

    Q, K, O, L (local) and S (segment) are five projections of the input.

    Args:
        dim: number of channels C.
        num_heads: number of heads H; by default `max(1, dim // head_dim)`.
        head_dim: channels per head D.
        segment_num: the segments have `N // segment_num + 1` tokens, so that their number is at most this one.
        segment_length: tokens of a segment, in place of `segment_num`; the boundaries then do not depend on N.
        window: odd number of tokens around each one for the local maximum.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool. What padding holds has no influence, but it
    counts in N, as in the published code: with `segment_num` it shifts the boundaries of the segments. Packed documents
    (`document_ids`, `(B, N)`, sequences only) each have their own mean, segments and maxima, and N is that of the pack.

    Raises:
        ConfigError: a size that is not positive, or an even window.
    """

    masks = True
    packs = True
    complexity = "N"
    memory = "N"
    source = "PoNet (2021), arXiv:2110.02442"
    equation = "y_t = W_o ((g + segmax(S)_t) * O_t + localmax(L)_t), g = softmax(mean(Q) K^T / sqrt(D)) K"
    alternatives = {"num_heads": 2, "head_dim": 16, "segment_num": 4, "segment_length": 5, "window": 5}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: Size | None = None,
        head_dim: Size = 64,
        segment_num: Size = 32,
        segment_length: Size | None = None,
        window: OddSize = 3,
    ) -> None:
        super().__init__()
        self.num_heads = max(1, dim // head_dim) if num_heads is None else num_heads
        self.head_dim, self.window = head_dim, window
        self.segment_num, self.segment_length = segment_num, segment_length
        width = self.num_heads * head_dim
        self.in_proj = nn.Linear(dim, 5 * width)
        self.out_proj = nn.Linear(width, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02 and zero biases, as in BERT."""
        for layer in (self.in_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        grid = self.check_grid(x)
        tokens = x.flatten(1, -2)
        mask = None if mask is None else mask.flatten(1)
        tokens = without_padding(tokens, mask)
        length = tokens.shape[1]
        index = None
        if document_ids is not None:
            if len(grid) != 1:
                raise ConfigError(f'mixer "{self.name}" honours document_ids in sequences only.')
            index, rows, longest = document_rows(document_ids)
            real = torch.ones_like(document_ids, dtype=torch.bool) if mask is None else mask
            tokens = rows_apart(tokens, index, rows, longest)
            mask = rows_apart(real.unsqueeze(-1), index, rows, longest).squeeze(-1)
        q, k, o, local, segment = self.in_proj(tokens).chunk(5, -1)
        segment, local = segment_pool(
            segment, local,
            segment_length=self.segment_length or length // self.segment_num + 1, window=self.window, mask=mask,
        )  # fmt: skip
        heads = (self.num_heads, self.head_dim)
        if mask is None:
            query = q.mean(1)
        else:
            weight = mask.to(q.dtype).unsqueeze(-1)
            query = (q * weight).sum(1) / weight.sum(1).clamp_min(1)
        k = k.unflatten(-1, heads)
        scores = (
            torch.einsum("bhd,bnhd->bhn", full_precision(query.unflatten(-1, heads)), full_precision(k))
            * self.head_dim**-0.5
        )
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -10000.0)
        mean = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1).to(k.dtype), k).flatten(1)
        y = (mean[:, None] + segment) * o + local
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        return self.out_proj(y if index is None else y[index]).reshape(x.shape)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From lxchtan/PoNet's `Attention`: W_q, W_k, W_v (the factor O), W_local, W_segment and ff."""
        names = ("W_q", "W_k", "W_v", "W_local", "W_segment")
        ours = {f"in_proj.{p}": torch.cat([state_dict[f"{n}.{p}"] for n in names]) for p in ("weight", "bias")}
        return {**ours, **{f"out_proj.{p}": state_dict[f"ff.{p}"] for p in ("weight", "bias")}}

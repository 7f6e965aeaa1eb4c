"""Mixers of video: grids of frames (T, H, W).

Axis letters: B batch, T frames, H height, W width, C channels, E inner channels, K paths, L = T H W tokens, R review
tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...schema import Count, OddSize, Positive, Size
from ..attention.attention import Attention
from ..base import Grid, Mixer
from ..orders.ordered import Ordered
from ..orders.orders import Order
from ..recurrent.ss2d import SS2D
from ..recurrent.ssm import Mamba2


class MixedSSM(SS2D, name="mixed_ssm"):
    """Four selective scans over the interleaved frames of a clip. VFIMamba (2024), arXiv:2407.02315.

    Four scans with parameters of their own read pixel by pixel, of each pixel all frames: by rows, by columns, and both
    backwards. The convolution sees one frame. Published for two frames; any number will do.

    Args:
        dim: number of channels C.
        d_state: states of each inner channel on each path.
        d_conv: side of the depthwise convolution; 1 for none.
        ssm_ratio: inner channels E per channel.
        dt_rank: rank of the projection to dt; by default ceil(dim / 16).
        official_unmerge: put the results of the two scans by columns where the official code puts them: not back where
            they came from, but as if a sequence held one frame after another (see `order_paths.frame_interleaved`).

    Shapes: `x` and the result `(B, T, H, W, C)`. A mask is refused, as by `SS2D`.

    Raises:
        ConfigError: a size that is not positive, or a convolution of even side.
    """

    axes = (3,)
    source = "VFIMamba (2024), arXiv:2407.02315"
    equation = "y = W_o norm(sum_k unscan_k(S6_k(scan_k(u)))), u = silu(depthwise(W x)), scans over interleaved frames"
    alternatives = {"d_state": 4, "d_conv": 5, "ssm_ratio": 1.0, "dt_rank": 5}

    def __init__(
        self,
        dim: int,
        *,
        d_state: Size = 16,
        d_conv: OddSize = 3,
        ssm_ratio: Positive = 2.0,
        dt_rank: Size | None = None,
        official_unmerge: bool = False,
    ) -> None:
        super().__init__(
            dim, d_state=d_state, d_conv=d_conv, ssm_ratio=ssm_ratio, dt_rank=dt_rank, gate=True, conv_bias=True
        )

        def paths(as_frames: bool) -> Order:
            names = ("frame_interleaved", "frame_interleaved_reversed")
            columns = {"columns": True, "as_frames": as_frames}
            return Order([part for name in names for part in (name, {"name": name, **columns})], interleaved=True)

        self.order, self.places, self.lines = paths(False), paths(official_unmerge), None

    def convolve(self, u: Tensor) -> Tensor:
        return super().convolve(u.flatten(0, 1)).unflatten(0, u.shape[:2])

    def put_back(self, y: Tensor, grid: Grid) -> Tensor:
        return self.places.merge(y, grid)


class Mate(Mixer, name="mate"):
    """The MATE block of LinGen (2024), arXiv:2412.09856, in place of attention over a whole video: `MA(x) + TE(x)`.

    MA is bidirectional Mamba-2: two scans with parameters of their own along the rotary-major order of the layer,
    forwards and backwards, each of which first reads R review tokens, the grid averaged over boxes of `review` tokens
    in each axis, so that its state knows the whole before it begins. TE, temporal Swin attention, is attention inside
    of boxes of tokens, which are moved by half a box in every second layer: what the scan tears apart stays together.
    Where the paper leaves a choice (both directions begin with the review tokens, the branches are added, the size of
    the boxes) it is ours; there is no official code to compare with.

    Args:
        dim: number of channels C.
        layer_index: position in the model; it turns the order and moves the boxes.
        d_state, expand: of Mamba-2.
        review: tokens per axis of which one review token is made; 0 for no review.
        window: tokens of an attention box in each axis (T, H, W).
        head_dim: channels per attention head.

    Shapes: `x` and the result `(B, T, H, W, C)`. A mask is refused: the review would see the padding.

    Raises:
        ConfigError: a size that is not positive.
    """

    axes = (3,)
    complexity = "N"
    memory = "N"
    source = "LinGen (2024), arXiv:2412.09856"
    equation = "y = MA(x) + TE(x), MA: Mamba-2 forwards and backwards along the clip, TE: attention in boxes"
    alternatives = {"d_state": 16, "expand": 1, "review": 0, "window": (1, 2, 2), "head_dim": 8}

    def __init__(
        self,
        dim: int,
        *,
        layer_index: Count = 0,
        d_state: Size = 64,
        expand: Size = 2,
        review: Count = 4,
        window: tuple[Size, Size, Size] = (4, 2, 2),
        head_dim: Size = 32,
    ) -> None:
        super().__init__()
        self.review = review
        self.order = Order(["rotary_major", "rotary_major_reversed"], layer_index=layer_index)
        self.scans = nn.ModuleList(Mamba2(dim, d_state=d_state, expand=expand) for _ in range(self.order.paths))
        self.attention = Ordered(
            dim,
            lambda length, causal: Attention(dim, causal=causal, head_dim=head_dim),
            order={"name": "window", "size": list(window)},
            causal_paths=False,
            layer_index=layer_index,
            can_be_causal="can",
        )

    def reset_parameters(self) -> None:
        """The values of Mamba-2 and of attention."""
        for mixer in (*self.scans, self.attention):
            mixer.reset_parameters()  # type: ignore[operator] - all are mixers

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        grid = self.check_grid(x)
        sequences = self.order.scan(x)  # (B, 2, L, C)
        length = sequences.shape[2]
        if self.review:
            boxes = [-(-s // self.review) for s in grid]
            pooled = F.adaptive_avg_pool3d(x.movedim(-1, 1), (boxes[0], boxes[1], boxes[2])).movedim(1, -1)
            sequences = torch.cat([self.order.scan(pooled), sequences], 2)
        results = [scan(sequences[:, k])[:, -length:] for k, scan in enumerate(self.scans)]
        return self.order.merge(torch.stack(results, 1), grid) + self.attention(x)

"""Average pooling minus identity in PyTorch calls; nothing is kept for the gradient but the mask.

B batch, C channels, N tokens, H height, W width; `*grid` is (N,), (H, W) or (T, H, W).

The operator is linear, y = D S M x - M x with the mask M, the window sum S and the division D by the counts, so that
the gradient is M S^T D g - M g: the same sums (mirrored when causal) over a scaled gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import document_starts
from ..common.registration import register_op

# Up to this window PyTorch's channels-last pooling beats sums by axis on a CPU: 2.5 times at 3 x 3, 1.1 times at 7 x 7.
SMALL = 7


def _trailing_sum(x: Tensor, dim: int, width: int, age: Tensor | None, reverse: bool) -> Tensor:
    """Sum of `width` tokens along `dim` that ends at each token (starts there, if reversed), by doubling.

    `age` (B, N, 1) counts the tokens before each one in its document; a sum does not reach further back.
    """
    size = x.shape[dim]

    def add(total: Tensor, other: Tensor, k: int) -> Tensor:  # total_t + other_{t - k}
        if k >= size:
            return total
        total = total.clone()
        early, late = other.narrow(dim, 0, size - k), other.narrow(dim, k, size - k)
        allowed = None if age is None else age.narrow(dim, k, size - k) >= k
        source = late if reverse else early
        total.narrow(dim, 0 if reverse else k, size - k).add_(source if allowed is None else source * allowed)
        return total

    total, done, power, k = None, 0, x, 1
    while True:
        if width & k:
            total, done = (power if total is None else add(total, power, done)), done + k
        k *= 2
        if k > width:
            assert total is not None
            return total
        power = add(power, power, k // 2)


def _window_sum(x: Tensor, pool_size: int, causal: bool, age: Tensor | None, transposed: bool) -> Tensor:
    if causal:
        return _trailing_sum(x, 1, pool_size, age, transposed)
    for dim in range(1, x.dim() - 1):
        radius, size = pool_size // 2, x.shape[dim]
        if radius and size > 1:
            total = _trailing_sum(x, dim, radius + 1, None, False)
            ahead = _trailing_sum(x, dim, radius, None, True)
            total.narrow(dim, 0, size - 1).add_(ahead.narrow(dim, 1, size - 1))
            x = total
    return x


def _age(document_ids: Tensor | None) -> Tensor | None:
    if document_ids is None:
        return None
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    first = torch.where(document_starts(document_ids), position, 0).cummax(1).values
    return (position - first)[..., None]


def _inverse_count(
    x: Tensor, high: torch.dtype, pool_size: int, causal: bool, mask: Tensor | None, age: Tensor | None
) -> Tensor:
    ones = torch.ones(1, *x.shape[1:-1], 1, dtype=high, device=x.device)
    if mask is not None:
        ones = mask[..., None].to(high)
    elif age is not None:
        return 1 / age.clamp_max(pool_size - 1).to(high).add_(1)
    return 1 / _window_sum(ones, pool_size, causal, age, False).clamp_min(1)


def _forward(x: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    high = torch.promote_types(x.dtype, torch.float32)
    wide = x.contiguous().to(high)
    if x.dim() == 4 and mask is None and pool_size <= SMALL and x.numel():
        view = wide.permute(0, 3, 1, 2)
        y = F.avg_pool2d(view, pool_size, 1, pool_size // 2, count_include_pad=False)
        return y.sub_(view).permute(0, 2, 3, 1).contiguous().to(x.dtype)
    age = _age(document_ids)
    inverse = _inverse_count(x, high, pool_size, causal, mask, age)
    if mask is not None:
        wide = torch.where(mask[..., None], wide, 0)
    y = (_window_sum(wide, pool_size, causal, age, False) * inverse).sub_(wide)
    return (y if mask is None else y.mul_(mask[..., None])).to(x.dtype)


def _backward(dy: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    high = torch.promote_types(dy.dtype, torch.float32)
    wide = dy.contiguous().to(high)
    age = _age(document_ids)
    inverse = _inverse_count(dy, high, pool_size, causal, mask, age)
    if mask is not None:
        wide = wide * mask[..., None]
    scaled = wide * inverse
    if dy.dim() == 4 and mask is None and pool_size <= SMALL and dy.numel():
        view = F.avg_pool2d(scaled.permute(0, 3, 1, 2), pool_size, 1, pool_size // 2, divisor_override=1)
        return view.permute(0, 2, 3, 1).sub_(wide).contiguous().to(dy.dtype)
    dx = _window_sum(scaled, pool_size, causal, age, True)
    dx = torch.sub(dx, wide, out=dx) if dx is not scaled else dx - wide
    return (dx if mask is None else dx.mul_(mask[..., None])).to(dy.dtype)


backward_op = register_op("pool_mix_eager_backward", _backward, "dy")
pool_mix_eager = register_op("pool_mix_eager", _forward, "x", gradient=backward_op, wrt="x", plain=_forward)

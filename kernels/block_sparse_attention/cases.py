"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes.

Compulsory here: q, y and the log-sum-exp once, and the keys and values of the active blocks once for every tile that
attends to them (heads that share a list are one tile). Minimal flops: two products over the active blocks forward and
seven backward, where scores and their gradients are made for queries and for keys, since sums without atomics need two
walks; the five of a single walk would be 0.78 of forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import Blocks, block_sparse_attention, blocks_of_mask


def _blocks(tiles: int, heads: int, block: int) -> Blocks:
    """The block of the tile, the first one, and others at random: about half of the causal ones."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, heads, tiles, tiles, generator=generator) < 0.3
    mask |= torch.eye(tiles, dtype=torch.bool)
    mask[..., 0] = True
    return blocks_of_mask(mask.tril(), block, block)


def _case(
    length: int,
    heads: int,
    groups: int,
    size: int,
    block: int,
    *,
    lists: int = 0,
    backward: bool = False,
    **options: Any,
) -> dict[str, int]:
    def normal(count: int) -> Tensor:
        return torch.randn(1, length, count, size, generator=generator).to(torch.bfloat16)

    generator = torch.Generator().manual_seed(1)
    q, k, v = normal(heads), normal(groups), normal(groups)
    lists = lists or heads
    blocks = _blocks(-(-length // block), lists, block)
    units = heads if lists == heads else groups
    active = len(blocks.ids) * (units // lists)  # tiles of units
    area, tile = active * (heads // units) * block * block, 2 * active * block * size * 2
    with torch.set_grad_enabled(backward):
        leaves = [t.requires_grad_(backward) for t in (q, k, v)]
        q, k, v = leaves
        y: Any = block_sparse_attention(q, k, v, blocks, causal=True, backend="triton", **options)
        forward = nbytes(q, y) + 4 * length * heads + tile
        if not backward:
            return {"bytes": forward, "flops": 4 * area * size}
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    # dq: q, y, dy, dq and the tiles; dk and dv: k, v and their gradients, and q and dy of every active tile
    rows = 2 * active * (heads // units) * block * size * 2
    total = forward + nbytes(q, y, y, *grads) + tile + nbytes(k, v) + rows
    return {"bytes": total, "flops": (2 + 7) * 2 * area * size}


def case_forward() -> dict[str, int]:
    """Forward, causal, blocks of 64, a list for every head."""
    return _case(512, 2, 2, 64, 64)


def case_backward() -> dict[str, int]:
    """Forward and backward of the same."""
    return _case(512, 2, 2, 64, 64, backward=True)


def case_backward_groups() -> dict[str, int]:
    """Forward and backward with grouped queries, blocks of 32 and permuted keys."""
    index = torch.rand(1, 2, 250, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return _case(250, 4, 2, 64, 32, lists=2, backward=True, k_index=index)


def case_forward_large() -> dict[str, int]:
    """Forward with 128 channels and blocks of 128."""
    return _case(512, 1, 1, 128, 128)


for _function in (case_forward, case_backward, case_backward_groups, case_forward_large):
    _function.matmul = True  # type: ignore[attr-defined]
del _function


def roofline() -> list[Cost]:
    """Compulsory costs of prefill of a Llama-3-8B layer, N = 32768, a quarter of the causal blocks of 128, bf16."""
    length, heads, groups, size, block = 32768, 32, 8, 128, 128
    tiles = length // block
    active = tiles * (tiles + 1) // 2 // 4 * groups
    rows = 2 * length * heads * size * 2 + 4 * length * heads
    area = active * (heads // groups) * block * block
    sizes = "Llama-3-8B layer: 32768 tokens, 32 heads of 128, 8 of keys, 25% of the causal blocks of 128"
    keys = 2 * length * groups * size * 2
    return [
        Cost("block_sparse_attention forward", sizes, rows + keys, matmul=4 * area * size),
        Cost("block_sparse_attention with backward", sizes, 2 * (rows + keys), matmul=14 * area * size),
    ]

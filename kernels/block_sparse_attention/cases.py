"""`block_sparse_attention` from outside: see `kernels/selftest/case.py`.

Asked for here: q, y and the log-sum-exp once, and the keys and values of the active blocks once for every tile that
attends to them (heads that share a list are one tile). Minimal flops: two products over the active blocks forward and
five backward, those of a single walk; sums without atomics need two walks, with seven.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.costs import nbytes
from ..selftest.case import Case, Draw, Flops, Size
from . import Blocks, block_sparse_attention, blocks_of_mask


def _blocks(tiles: int, lists: int, block: int, quarter: bool, device: str) -> Blocks:
    """The block of the tile and others at random: about half of the causal ones, or exactly a quarter."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(1, lists, tiles, tiles, generator=generator) - 2 * torch.eye(tiles)
    if quarter:
        score = score.masked_fill(torch.ones(tiles, tiles, dtype=torch.bool).triu(1), 2)
        mask = score.argsort(-1).argsort(-1) < (torch.arange(1, tiles + 1)[:, None] / 4).ceil()
    else:
        mask = score < 0.3
        mask[..., 0] = True
    blocks = blocks_of_mask(mask.tril(), block, block)
    return blocks._replace(offsets=blocks.offsets.to(device), ids=blocks.ids.to(device))


def _inputs(
    draw: Draw, *, B: int, L: int, H: int, D: int, block: int, G: int | None = None, lists: int | None = None,
    quarter: bool = False, permuted: bool = False, mask: bool = False, documents: bool = False,
    window: int | None = None, lse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    groups = G or H
    index = torch.rand(1, groups, L, generator=torch.Generator().manual_seed(2)).argsort(-1) if permuted else None
    return {
        "q": draw.normal(B, L, H, D),
        "k": draw.normal(B, L, groups, D),
        "v": draw.normal(B, L, groups, D),
        "blocks": _blocks(-(-L // block), lists or H, block, quarter, draw.device),
        "causal": True,
        "window": window,
        "key_mask": draw.mask(B, L) if mask else None,
        "document_ids": draw.documents(B, L) if documents else None,
        "k_index": index if index is None else index.to(draw.device),
        "return_lse": lse,  # not where a query may see nothing: the logarithm of 0
    }


def _active(L: int, H: int, block: int, G: int | None, lists: int | None, quarter: bool) -> int:
    """Pairs of a unit's tile and a key block; a unit is a head, or the heads of a key head where they share lists."""
    lists = lists or H
    units = H if lists == H else G or H
    return len(_blocks(-(-L // block), lists, block, quarter, "cpu").ids) * (units // lists)


def _flops(
    backward: bool, *, B: int, L: int, H: int, D: int, block: int, G: int | None = None, lists: int | None = None,
    quarter: bool = False, **_: Any,
) -> Flops:  # fmt: skip
    tiles = -(-L // block)
    if quarter:  # of the causal ones, of every head
        pairs = H * (tiles * (tiles + 1) // 2 // 4)
    else:
        pairs = _active(L, H, block, G, lists, quarter) * (1 if (lists or H) == H else H // (G or H))
    scores = B * pairs * block * block
    return Flops((14 if backward else 4) * scores * D, exponentials=(2 if backward else 1) * scores)


def _asked(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    q, k, v, blocks = (inputs[name] for name in ("q", "k", "v", "blocks"))
    (_, length, heads, size), groups, lists = q.shape, k.shape[2], blocks.offsets.shape[1]
    units = heads if lists == heads else groups
    active = len(blocks.ids) * (units // lists)
    tile = active * 2 * blocks.block_k * size * k.element_size()
    forward = nbytes(q, outputs[0]) + 4 * length * heads + tile
    if not backward:
        return forward
    # dq: q, y, dy, dq and the tiles; dk and dv: k, v and their gradients, and q and dy of every active tile
    rows = 2 * active * (heads // units) * blocks.block_q * size * q.element_size()
    return forward + nbytes(q, q, *outputs[:1] * 2) + tile + 2 * nbytes(k, v) + rows


_HEADS = {"B": 1, "L": 512, "H": 2, "D": 64, "block": 64}
_GROUPS = {"B": 1, "L": 250, "H": 4, "G": 2, "D": 64, "block": 32, "lists": 2, "permuted": True}

CASES = [
    Case(
        run=block_sparse_attention,
        inputs=_inputs,
        like=("q",),
        flops=_flops,
        small={
            "forward": Size(_HEADS, backward=False),
            "backward": Size(_HEADS),
            "backward_groups": Size(_GROUPS),
            "forward_large": Size({"B": 1, "L": 512, "H": 1, "D": 128, "block": 128}, backward=False),
            "backward_wide": Size({"B": 1, "L": 128, "H": 1, "D": 256, "block": 64}),
            "backward_float32": Size({"B": 1, "L": 64, "H": 1, "D": 128, "block": 32}, torch.float32),
            "backward_float32_wide": Size({"B": 1, "L": 64, "H": 1, "D": 256, "block": 32}, torch.float32),
        },
        odd=(
            {"B": 2, "L": 41, "H": 4, "G": 2, "D": 24, "block": 16, "lists": 2, "mask": True, "documents": True},
            {"B": 1, "L": 3, "H": 1, "D": 5, "block": 16, "lse": True},
            {"B": 1, "L": 200, "H": 4, "G": 2, "D": 128, "block": 32, "permuted": True, "window": 70},
        ),
        models={"Llama-3-8B layer: 32768 tokens, 32 heads of 128, 8 of keys, 25% of the causal blocks of 128": {
            "B": 1, "L": 32768, "H": 32, "G": 8, "D": 128, "block": 128, "quarter": True,
        }},
        asked=_asked,
    )
]  # fmt: skip

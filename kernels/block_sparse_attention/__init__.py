"""Softmax attention to lists of active key blocks.

Work and memory are proportional to the active blocks. Tiles and running softmax are those of FlashAttention-2 (2023),
arXiv:2307.08691; keys read in another order than they lie in memory as in PBS-Attn (2025), arXiv:2510.21270.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ..common.chunking import keys_limit
from ..common.dispatch import Op, check_shapes
from .blocks import Blocks, blocks_of_lists, blocks_of_mask, check_blocks, check_permutation
from .problem import Problem

__all__ = ["Blocks", "block_sparse_attention", "blocks_of_lists", "blocks_of_mask"]

_OP = Op("block_sparse_attention", __name__, limit=keys_limit, empty="reference")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    causal: bool = False,
    window: int | None = None,
    global_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    key_document_ids: Tensor | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`y_i = sum_j softmax_j(scale * q_i k_j) v_j` over the keys j that query i sees.

    Query i sees key j when the block of j is in the list of the tile of i, and every rule below allows it. A query that
    sees nothing gets zeros (and a log-sum-exp of -inf). Tile t holds the queries in the places `t * block_q` onwards,
    block s the keys in the places `s * block_k` onwards; what stands in a place is told by `q_index` and `k_index`,
    else token n stands in place n. Nothing is permuted in memory on a GPU, and outputs are in the order of q. The head
    h uses key-value head h // (H / G); heads with the same list and keys share tiles.

    Args:
        q: (B, N, H, D).
        k, v: (B, M, G, D), G a divisor of H.
        blocks: the lists, for (B or 1) x (1, G or H); see `Blocks`, `blocks_of_mask`, `blocks_of_lists`.
        causal: only keys at positions up to the query's.
        window: only keys less than `window` positions away, or global ones.
        global_keys: (B or 1, M) bool, True for keys that every query sees, whatever the window.
        key_mask: (B, M) bool, False for padding, which nothing sees.
        document_ids: (B, N) non-negative integers; a query sees only keys of the same document id.
        key_document_ids: (B, M), those of the keys; by default `document_ids`, with M = N.
        positions: (B or 1, N) integers; by default M - N + n: the last query stands at the last key.
        key_positions: (B or 1, M) integers; by default m.
        q_index: (B or 1, 1 or H, N) integers, a permutation: place -> query.
        k_index: (B or 1, 1, G or H, M) integers, a permutation: place -> key.
        scale: by default D ** -0.5.
        return_lse: also return the logarithm of the sum of exponentials.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, N, H, D) in the dtype of v, or `(y, lse)` with lse (B, H, N) in float32. Both have gradients. Sums are in
        float32 (float64 for float64 inputs), in a fixed order.

    Raises:
        ConfigError: shapes that do not fit, heads that do not divide, or (checked on the CPU) an index that is not a
            permutation and block numbers out of range.
        RuntimeError: a backend that cannot run here.
    """
    sizes = check_shapes(_OP.name, q=("B N H D", q), k=("B M G D", k), v=("B M G D", v))
    batch, queries, heads, size, keys, groups = (sizes[x] for x in "BNHDMG")
    if groups < 1 or heads % groups:
        raise ConfigError(f"{_OP.name}: the {groups} key-value heads of k do not divide the {heads} heads of q.")
    if window is not None and window < 1:
        raise ConfigError(f"{_OP.name}: window={window} is not positive.")
    if global_keys is not None and window is None:
        raise ConfigError(f"{_OP.name}: global_keys have no effect without window.")
    check_blocks(blocks, batch, heads, groups, queries, keys)
    check_permutation("q_index", q_index, batch, (1, heads), queries)
    check_permutation("k_index", k_index, batch, (1, groups, heads), keys)
    for name, tensor, length in (
        ("global_keys", global_keys, keys), ("key_mask", key_mask, keys), ("document_ids", document_ids, queries),
        ("key_document_ids", key_document_ids, keys), ("positions", positions, queries),
        ("key_positions", key_positions, keys),
    ):  # fmt: skip
        if tensor is not None and (tensor.ndim != 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != length):
            raise ConfigError(
                f"{_OP.name}: {name} has shape {tuple(tensor.shape)}; it must be ({batch} or 1, {length})."
            )
    if key_document_ids is not None and document_ids is None:
        raise ConfigError(f"{_OP.name}: key_document_ids need document_ids.")
    if document_ids is not None and key_document_ids is None:
        if queries != keys:
            raise ConfigError(
                f"{_OP.name}: {queries} queries and {keys} keys need key_document_ids beside document_ids."
            )
        key_document_ids = document_ids
    if key_mask is not None:  # padding is a document that no query has
        if document_ids is None or key_document_ids is None:
            document_ids = key_mask.new_zeros(1, queries, dtype=torch.int32)
            key_document_ids = key_mask.new_zeros(1, keys, dtype=torch.int32)
        key_document_ids = torch.where(key_mask, key_document_ids, -1)

    def narrow(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.int32).contiguous()

    problem = Problem(
        Blocks(blocks.offsets.to(torch.int32).contiguous(), blocks.ids.to(torch.int32).contiguous(), *blocks[2:]),
        size**-0.5 if scale is None else float(scale),
        causal,
        -1 if window is None else window,
        narrow(positions),
        narrow(key_positions),
        narrow(document_ids),
        narrow(key_document_ids),
        narrow(global_keys),
        None if q_index is None else q_index.long(),
        None if k_index is None else k_index.long(),
    )
    y, lse = _OP(backend, q, k, v, problem)
    return (y, lse) if return_lse else y

"""The chunked form of `gla` in PyTorch.

Inside a chunk the score of a query at t with a key at s is sum_k q_t k_s exp(G_t - G_s), G the summed log decay, with
one decay per key channel: no factor exp(-G_s) may be split off, as it overflows. So pairs are sorted by the bit in
which t and s first differ: at that level both lie in one block of 2 h tokens, s in its first half and t in its second,
and the decay splits at the middle into two factors <= 1. Every level is one product of matrices, with its own sums of
g, and nothing is ever a difference of large sums.

Axis letters: B batch, L length, H heads, K key size, V value size, n chunks, c tokens of a chunk, h tokens of a half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunking import (
    carry_states,
    chunk_count,
    compute_dtype,
    first_tokens,
    is_exporting,
    pad_time,
    scan_fake,
)
from ..common.packing import carry_sequences, document_index, in_chunks
from ..common.registration import recomputed

CHUNK = 64  # c, a power of two


def gla_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `gla`."""
    with torch.autocast(v.device.type, enabled=False):
        return _scan(q, k, v, g, scale, initial_state, document_ids, cu_seqlens)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, size = v.shape
    keys = q.shape[3]
    dtype = compute_dtype(q, k, v, g, initial_state)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state = v.new_zeros(rows, heads, keys, size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    chunk = CHUNK
    while not is_exporting() and chunk >= 2 * max(length, 1):
        chunk //= 2
    sequences = None if cu_seqlens is None else in_chunks(cu_seqlens, length, chunk)
    chunks = chunk_count(length, chunk) if sequences is None else len(sequences.owner)

    def cut(x: Tensor) -> Tensor:  # (B, L, H, ...) -> (B, n, H, c, ...)
        x = x.to(dtype)
        x = pad_time(x, chunks * chunk) if sequences is None else sequences.lay(x)
        return x.unflatten(1, (chunks, chunk)).transpose(2, 3).contiguous()

    queries, keyed, values, decay = cut(q) * scale, cut(k), cut(v), cut(g)
    scores = torch.diag_embed((queries * keyed).sum(-1))  # (B, n, H, c, c); t = s, no decay
    half = 1
    while half < chunk:
        first, second = decay.unflatten(3, (-1, 2, half)).unbind(4)  # (B, n, H, c / 2h, h, K)
        left = keyed.unflatten(3, (-1, 2, half))[..., 0, :, :] * _after(first).exp()
        right = queries.unflatten(3, (-1, 2, half))[..., 1, :, :] * second.cumsum(4).exp()
        if half < 4:  # too small for a batched product
            block = (right[..., :, None, :] * left[..., None, :, :]).sum(-1)
        else:
            block = right @ left.transpose(-1, -2)
        places = scores.unflatten(4, (-1, 2 * half)).unflatten(3, (-1, 2 * half)).diagonal(dim1=3, dim2=5)
        places[..., half:, :half, :].copy_(block.movedim(3, -1))
        half *= 2

    until = decay.cumsum(3).exp()  # decay from the chunk's start to each token
    after = _after(decay).exp()  # from each token to the chunk's end
    passed = decay.sum(3).exp()
    if document_ids is not None:
        index = document_index(document_ids)
        index = torch.cat([index, index[:, -1:].expand(-1, chunks * chunk - length)], 1).unflatten(1, (chunks, chunk))
        last = index[:, :, -1]
        before = torch.nn.functional.pad(last[:, :-1], (1, 0))
        scores = scores * (index[:, :, :, None] == index[:, :, None, :])[:, :, None]
        until = until * (index == before[..., None])[:, :, None, :, None]
        after = after * (index == last[..., None])[:, :, None, :, None]
        passed = passed * (last == before)[:, :, None, None]
    update = (keyed * after).transpose(-1, -2) @ values
    if sequences is None:
        starts, state = carry_states(update, passed[..., None], state)
    else:
        starts, state = carry_sequences(carry_states, update, passed[..., None], state, sequences)
    y = scores @ values + (queries * until) @ starts
    y = y.transpose(2, 3).flatten(1, 2)
    y = first_tokens(y, length) if sequences is None else y.index_select(1, sequences.back)
    return y.to(v.dtype), state


def _after(g: Tensor) -> Tensor:
    """Sum of the later rows (axis -2) for each row, without subtracting."""
    return torch.nn.functional.pad(g.flip(-2).cumsum(-2).flip(-2)[..., 1:, :], (0, 0, 0, 1))


_scan = recomputed("gla_eager", _forward, scan_fake, outputs="y final", wrt="q k v g initial_state")

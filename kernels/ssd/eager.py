"""The chunked form of `ssd` in PyTorch: matrix products inside chunks, one state per chunk between them.

Axis letters: B batch, L length, G groups, R heads of a group, H = G R heads, K key size, V value size, n chunks,
c tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunking import (
    carry_states,
    chunk_count,
    chunk_size,
    compute_dtype,
    first_tokens,
    pad_time,
    scan_fake,
    sums_of,
)
from ..common.packing import carry_sequences, document_index, in_chunks
from ..common.registration import recomputed

CHUNK = 64  # c: products with the state cost K V per token, those inside a chunk c (K + V) / 2


def ssd_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `ssd`."""
    with torch.autocast(v.device.type, enabled=False):
        return _scan(q, k, v, g, beta, scale, initial_state, document_ids, cu_seqlens)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, size = v.shape
    groups, keys = q.shape[2:]
    dtype = compute_dtype(q, k, v, g, initial_state)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (rows, groups, heads // groups, keys, size)
    state = v.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype).reshape(shape)
    chunk = chunk_size(length, CHUNK)
    sequences = None if cu_seqlens is None else in_chunks(cu_seqlens, length, chunk)
    chunks = chunk_count(length, chunk) if sequences is None else len(sequences.owner)
    state = state.transpose(2, 3)  # (B, G, K, R, V): one product serves all heads of a group

    def cut(x: Tensor) -> Tensor:  # (B, L, ...) -> (B, n, c, ...)
        x = x.to(dtype)
        x = pad_time(x, chunks * chunk) if sequences is None else sequences.lay(x)
        return x.unflatten(1, (chunks, chunk))

    queries = cut(q).transpose(2, 3) * scale  # (B, n, G, c, K)
    keyed = cut(k).transpose(2, 3)
    values = cut(v).unflatten(3, (groups, -1)).permute(0, 1, 3, 2, 4, 5)  # (B, n, G, c, R, V)
    steps = v.new_zeros(batch, chunks, chunk, heads, dtype=dtype) if g is None else cut(g)
    until, after, through, pairs = sums_of(steps.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2))  # (B, n, G, R, c)
    if beta is not None:
        values = values * cut(beta).unflatten(3, (groups, -1)).permute(0, 1, 3, 2, 4)[..., None]

    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril()
    carried = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool, device=v.device)  # tokens that see the state before the chunk
    kept, passed = (
        carried,
        carried[..., 0],
    )  # tokens that reach the state after it; does the old state reach the new one
    if document_ids is not None:
        index = document_index(document_ids)
        index = torch.cat([index, index[:, -1:].expand(-1, chunks * chunk - length)], 1).unflatten(1, (chunks, chunk))
        last = index[:, :, -1]
        before = torch.nn.functional.pad(last[:, :-1], (1, 0))
        visible = visible & (index[:, :, :, None] == index[:, :, None, :])[:, :, None, None]
        carried = (index == before[..., None])[:, :, None, None]
        kept = (index == last[..., None])[:, :, None, None]
        passed = (last == before)[:, :, None, None]

    # The mask goes in before exp: the differences above the diagonal are positive.
    decay = pairs.masked_fill(~visible, -torch.inf).exp()
    scores = (queries @ keyed.transpose(-1, -2))[:, :, :, None] * decay  # (B, n, G, R, c, c)
    inside = scores @ values.transpose(3, 4)  # (B, n, G, R, c, V)

    weight = after.exp() * kept  # decay from each token to the chunk's end
    update = keyed.transpose(-1, -2) @ (values * weight.transpose(-1, -2)[..., None]).flatten(4)
    factor = (through.exp() * passed)[:, :, :, None, :, None]  # (B, n, G, 1, R, 1)
    update = update.unflatten(4, (-1, size))
    if sequences is None:
        starts, state = carry_states(update, factor, state)
    else:
        starts, state = carry_sequences(carry_states, update, factor, state, sequences)
    outside = (queries @ starts.flatten(4)).unflatten(4, (-1, size))  # (B, n, G, c, R, V)
    y = inside.transpose(3, 4) + outside * (until.exp() * carried).transpose(-1, -2)[..., None]
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, chunks * chunk, heads, size)
    y = first_tokens(y, length) if sequences is None else y.index_select(1, sequences.back)
    return y.to(v.dtype), state.transpose(2, 3).reshape(rows, heads, keys, size)


_scan = recomputed("ssd_eager", _forward, scan_fake, outputs="y final", wrt="q k v g beta initial_state")

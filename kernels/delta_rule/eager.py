"""The chunked form of `delta_rule` in PyTorch (WY form; Yang et al. 2024, arXiv:2406.06484 and 2412.06464).

Inside a chunk the corrected values are n_t = beta_t (v_t - (what the state before t answers to k_t)). Written with the
state S before the chunk they solve the unit lower triangular system

    n_t + beta_t sum_{s < t} exp(G_t - G_s) (k_t . k_s) n_s = beta_t (v_t - exp(G_t) k_t S)

with G the log decay summed from the chunk's start, and outputs and states follow from k and n as in `ssd`.

Axis letters: B batch, L length, H heads, K key size, V value size, n chunks, c tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunking import (
    chunk_count,
    chunk_size,
    compute_dtype,
    first_tokens,
    fold,
    is_exporting,
    pad_time,
    scan_fake,
    sums_of,
)
from ..common.packing import document_index, in_chunks
from ..common.registration import recomputed

CHUNK = 64  # c


def delta_rule_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `delta_rule`."""
    with torch.autocast(v.device.type, enabled=False):
        return _scan(q, k, v, beta, g, scale, initial_state, document_ids, cu_seqlens)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
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
    chunk = chunk_size(length, CHUNK)
    sequences = None if cu_seqlens is None else in_chunks(cu_seqlens, length, chunk)
    chunks = chunk_count(length, chunk) if sequences is None else len(sequences.owner)
    if not is_exporting() and chunks == 0:
        return v, state

    def cut(x: Tensor) -> Tensor:  # (B, L, H, ...) -> (n, B, H, c, ...)
        x = x.to(dtype)
        x = pad_time(x, chunks * chunk) if sequences is None else sequences.lay(x)
        return x.unflatten(1, (chunks, chunk)).transpose(2, 3).transpose(0, 1)

    group = heads // k.shape[2]
    queries, keyed, values = (cut(q) * scale).repeat_interleave(group, 2), cut(k).repeat_interleave(group, 2), cut(v)
    rate = cut(beta[..., None])
    until, after, through, pairs = sums_of(torch.zeros_like(rate[..., 0]) if g is None else cut(g))  # (n, B, H, c)

    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril()
    carried = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=v.device)  # tokens that see the state before the chunk
    kept, passed = (
        carried,
        carried[..., 0],
    )  # tokens that reach the state after it; does the old state reach the new one
    if document_ids is not None:
        index = document_index(document_ids)
        index = torch.cat([index, index[:, -1:].expand(-1, chunks * chunk - length)], 1).unflatten(1, (chunks, chunk))
        index = index.transpose(0, 1)
        last = index[:, :, -1]
        before = torch.nn.functional.pad(last[:-1], (0, 0, 1, 0))
        visible = visible & (index[:, :, :, None] == index[:, :, None, :])[:, :, None]
        carried = (index == before[..., None])[:, :, None]
        kept = (index == last[..., None])[:, :, None]
        passed = (last == before)[:, :, None]

    # The mask goes in before exp: the differences above the diagonal are positive.
    decay = pairs.masked_fill(~visible, -torch.inf).exp()
    until = (until.exp() * carried)[..., None]
    after = (after.exp() * kept)[..., None]
    passed = (through.exp() * passed)[..., None, None]

    system = (rate * keyed) @ keyed.transpose(-1, -2) * decay  # the solver takes the diagonal as 1, whatever it holds
    right = torch.cat([rate * values, rate * until * keyed], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, erased = solved.split([size, keys], -1)  # n = new - erased S

    ending = (keyed * after).transpose(-1, -2)
    scores = queries @ keyed.transpose(-1, -2) * decay
    if is_exporting() and sequences is None:

        def step(before: Tensor, *part: Tensor) -> tuple[Tensor, Tensor]:
            added, removed, factor, outer = part
            new_values = added - removed @ before
            return factor * before + outer @ new_values, torch.cat([new_values, before], -2)

        state, found = fold(step, state, new, erased, passed, ending)
        found, starting = found.split([chunk, keys], -2)
        y = scores @ found + (queries * until) @ starting
        return first_tokens(y.transpose(0, 1).transpose(2, 3).flatten(1, 2), length).to(v.dtype), state
    corrected, starts, ends = [], [], []
    initial = state
    if sequences is not None:
        state = initial[:1]
    # unbind, not indexing: the gradient of an index is a tensor as long as the sequence, once per chunk
    parts = zip(
        new.flatten(1, 2).unbind(),
        erased.flatten(1, 2).unbind(),
        passed.unbind(),
        ending.flatten(1, 2).unbind(),
        strict=True,
    )
    for i, (added, removed, factor, outer) in enumerate(parts):
        if sequences is not None:
            own = sequences.before(initial, sequences.owner[i : i + 1])
            state = torch.where(sequences.opens[i], own, state)
        starts.append(state)
        corrected.append(torch.baddbmm(added, removed, state.flatten(0, 1), alpha=-1))
        state = factor * state + (outer @ corrected[-1]).view_as(state)
        if sequences is not None:
            ends.append(state)
    y = scores @ torch.stack(corrected).view_as(new) + (queries * until) @ torch.stack(starts)
    y = y.transpose(0, 1).transpose(2, 3).flatten(1, 2)
    if sequences is None:
        return y[:, :length].to(v.dtype), state
    return y.index_select(1, sequences.back).to(v.dtype), torch.cat(ends).index_select(0, sequences.last)


_scan = recomputed("delta_rule_eager", _forward, scan_fake, outputs="y final", wrt="q k v beta g initial_state")

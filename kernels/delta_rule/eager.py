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

from ..common.chunking import compute_dtype, pad_time, recompute
from ..common.documents import document_index

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
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `delta_rule`."""
    with torch.autocast(v.device.type, enabled=False):
        return recompute(_forward, q, k, v, beta, g, scale, initial_state, document_ids)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, size = v.shape
    keys = q.shape[3]
    dtype = compute_dtype(q, k, v, g, initial_state)
    state = v.new_zeros(batch, heads, keys, size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    chunk = min(CHUNK, max(length, 1))
    chunks = -(-length // chunk)
    if chunks == 0:
        return v, state

    def cut(x: Tensor) -> Tensor:  # (B, L, H, ...) -> (n, B, H, c, ...)
        return pad_time(x.to(dtype), chunks * chunk).unflatten(1, (chunks, chunk)).transpose(2, 3).transpose(0, 1)

    queries, keyed, values = cut(q) * scale, cut(k), cut(v)
    rate = cut(beta[..., None])
    total = torch.zeros_like(rate[..., 0]) if g is None else cut(g).cumsum(-1)  # (n, B, H, c)

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
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    until = (total.exp() * carried)[..., None]
    after = ((total[..., -1:] - total).exp() * kept)[..., None]
    passed = (total[..., -1].exp() * passed)[..., None, None]

    system = (rate * keyed) @ keyed.transpose(-1, -2) * decay  # the solver takes the diagonal as 1, whatever it holds
    right = torch.cat([rate * values, rate * until * keyed], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, erased = solved.split([size, keys], -1)  # n = new - erased S

    ending = (keyed * after).transpose(-1, -2)
    corrected, starts = [], []
    # unbind, not indexing: the gradient of an index is a tensor as long as the sequence, once per chunk
    parts = zip(
        new.flatten(1, 2).unbind(),
        erased.flatten(1, 2).unbind(),
        passed.unbind(),
        ending.flatten(1, 2).unbind(),
        strict=True,
    )
    for added, removed, factor, outer in parts:
        starts.append(state)
        corrected.append(torch.baddbmm(added, removed, state.flatten(0, 1), alpha=-1))
        state = factor * state + (outer @ corrected[-1]).view_as(state)
    scores = queries @ keyed.transpose(-1, -2) * decay
    y = scores @ torch.stack(corrected).view_as(new) + (queries * until) @ torch.stack(starts)
    return y.transpose(0, 1).transpose(2, 3).flatten(1, 2)[:, :length].to(v.dtype), state

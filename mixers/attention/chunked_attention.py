"""Attention of some positions to others, block of queries by block of queries, without an N x N mask.

Axis letters: B batch, N tokens, M keys, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import dense_attention


class Rule(NamedTuple):
    """Which keys a query sees, by the positions p of both.

    causal: only p_key <= p_query.
    window: only |p_query - p_key| < window, the query's own token included; None for no limit.
    sinks: the first tokens of a document, which stay visible outside the window. StreamingLLM (2023), arXiv:2309.17453.
    slopes: (H,) of ALiBi, or None: `-slope * |p_query - p_key|` is added to the scores.
    """

    causal: bool
    window: int | None = None
    sinks: int = 0
    slopes: Tensor | None = None


def bias_of(rule: Rule, query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
    """What `kernels.dense_attention` takes as `bias`.

    Args:
        query: (B, N) or (1, N) positions.
        key: (B, M) or (1, M) positions.
        valid: bool that broadcasts to (B, N, M): further restrictions.

    Returns:
        (B or 1, 1, N, M) bool, or (B or 1, H, N, M) float32 with ALiBi.
    """
    distance = query[:, :, None] - key[:, None, :]
    visible = (
        torch.ones_like(distance, dtype=torch.bool)
        if valid is None
        else valid.expand(torch.broadcast_shapes(valid.shape, distance.shape))
    )
    if rule.causal:
        visible = visible & (distance >= 0)
    if rule.window is not None:
        visible = visible & ((distance.abs() < rule.window) | (key[:, None, :] < rule.sinks))
    if rule.slopes is None:
        return visible[:, None]
    bias = -rule.slopes[:, None, None] * distance.abs()[:, None].float()
    return bias.masked_fill(~visible[:, None], float("-inf"))


def weigh(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, form: str = "softmax", causal: bool = False
) -> Tensor:
    """The weighted mean of values, (B, H, N, D), for queries (B, H, N, D), keys and values (B, G, M, D).

    Args:
        bias: bool (what is visible) or float (added to the scores), broadcast to (B, H, N, M).
        form: "softmax" of scaled dot products, or "linear": products of elu + 1, normalised; a float bias then is the
            logarithm of a factor.
        causal: only keys up to the query's index, without a bias.
    """
    if form == "softmax":
        return dense_attention(q, k, v, bias, causal=causal)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
    weight = (F.elu(q.float()) + 1) @ (F.elu(k.float()) + 1).mT
    if causal:
        weight = weight.tril()
    elif bias is not None:
        weight = weight.masked_fill(~bias, 0.0) if bias.dtype == torch.bool else weight * bias.float().exp()
    return ((weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)) @ v.float()).to(v.dtype)


class _Runs:
    """Runs (B, G, high - low, D) of keys or values (B, G, M, D), cut from blocks.

    The gradient of a slice of the whole is as long as the whole, so that a slice for every chunk of queries would make
    backward quadratic.
    """

    def __init__(self, x: Tensor, block: int, sinks: int) -> None:
        self.whole, self.block, self.blocks = x, block, x.split(block, 2)
        self.first = x[:, :, :sinks]

    def __call__(self, low: int, high: int, sinks: int) -> Tensor:
        if low == 0 and high == self.whole.shape[2]:
            return self.whole
        begin = low // self.block
        blocks = self.blocks[begin : -(-high // self.block)]
        run = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
        run = run.narrow(2, low - begin * self.block, high - low)
        return torch.cat([self.first[:, :, :sinks], run], 2) if sinks else run


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    *,
    form: str = "softmax",
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    segment: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Softmax attention under a rule, a chunk of queries at a time: memory grows with N, time with N x window.

    Args:
        q: (B, N, H, D).
        k, v: (B, M, G, D); head h uses key-value head h // (H / G).
        form: see `weigh`.
        positions: (B or 1, N) positions of the queries; by default 0 .. N-1.
        key_positions: (B or 1, M) positions of the keys; by default those of the queries, and M = N.
        segment: (B, N) number of the document of every token; only tokens of the same one see each other.
        valid: (B, M) bool, False for keys that nobody may see.

    Returns:
        (B, N, H, D).
    """
    length = q.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    plain = rule.window is None and rule.slopes is None and segment is None and key_positions is None
    if plain and not (rule.causal and valid is not None):
        seen = None if valid is None else valid[:, None, None, :]
        return weigh(q, k, v, seen, form=form, causal=rule.causal).transpose(1, 2)
    if positions is None:
        positions = torch.arange(length, device=q.device)[None]
    # keys in the order of the queries: a chunk of queries needs only the keys around it
    sliced = key_positions is None
    key_positions = positions if key_positions is None else key_positions
    near = rule.window is not None and sliced and not (rule.sinks and segment is not None)
    chunk = min(1024, max(128, rule.window)) if rule.window is not None else 256
    outputs, queries = [], q.split(chunk, 2)
    key_runs, value_runs = (_Runs(t, chunk, rule.sinks) for t in (k, v))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        low, high = 0, k.shape[2]
        if near:
            assert rule.window is not None
            low = max(0, start - rule.window + 1)
            high = stop if rule.causal else min(high, stop + rule.window - 1)
        elif rule.causal and sliced:
            high = stop
        sinks = min(rule.sinks, low)

        def keys(t: Tensor, axis: int, low: int = low, high: int = high, sinks: int = sinks) -> Tensor:
            piece = t.narrow(axis, low, high - low)
            return torch.cat([t.narrow(axis, 0, sinks), piece], axis) if sinks else piece

        allowed = None if valid is None else keys(valid, 1)[:, None, :]
        if segment is not None:
            same = segment[:, start:stop, None] == keys(segment, 1)[:, None, :]
            allowed = same if allowed is None else same & allowed
        bias = bias_of(rule, positions[:, start:stop], keys(key_positions, 1), allowed)
        bias = bias if bias.dtype == torch.bool else bias.to(q.dtype)
        run = (low, high, sinks)
        outputs.append(weigh(queries[start // chunk], key_runs(*run), value_runs(*run), bias, form=form))
    return torch.cat(outputs, 2).transpose(1, 2)

"""Attention of every query to the tokens that an indexer finds for it.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head, J heads of the indexer, E
channels of each, K chosen tokens, P places of the cache. `*grid` is (N,), (H, W) or (T, H, W), in raster order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import block_sparse_attention, blocks_of_lists
from ...schema import Size, Tile
from ..losses import aux_loss
from .cached_attention import CachedAttention, CachedOptions, appended, doubled, lengthened
from .token_selection import Chosen, choose_by_vote, choose_flat, choose_hierarchical

INDEXERS = ("flat", "hierarchical", "vote")
_LOSS_QUERIES = 64  # of a batch element that teach the indexer in a step


class IndexedState(NamedTuple):
    """keys, values: (B, P, G, D); index_keys: (B, P, E), E = 0 for a vote; length: (B,); used: places in use."""

    keys: Tensor
    values: Tensor
    index_keys: Tensor
    length: Tensor
    used: int


class IndexedAttention(CachedAttention, name="indexed_attention"):
    """Softmax attention over the `top_k` tokens with the highest index scores, the same for all heads.

    The flat indexer scores all keys: `sum_j w_j relu(q_j k)` with few small heads and one key for all of them, as in
    DeepSeek Sparse Attention. The hierarchical one (HISA) first takes `candidates` blocks by their mean keys and scores
    only the keys in these. "vote" has no parameters: heads vote with their own attention (TokenSelect). A choice has no
    gradient; in training mode the indexer learns from its own loss, the Kullback-Leibler divergence from the attention
    summed over heads to the softmax of its scores, both over the chosen tokens. It leaves by `aux_loss("indexer", ...)`
    and reaches the indexer alone.

    Args:
        dim: number of channels C.
        causal: a token sees only itself and those before it.
        num_heads, head_dim, num_kv_heads, qkv_bias, proj_bias, position, rope_theta: as in `attention`; position is
            "none" or "rotary".
        top_k: tokens that a query attends to, K.
        indexer: flat, hierarchical or vote.
        index_heads, index_dim: J and E.
        block_size, candidates: of the hierarchical indexer.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool, False tokens are never attended to.

    Raises:
        ConfigError: sizes that are not positive, or an unknown indexer.
    """

    source = "DeepSeek-V3.2: DeepSeek Sparse Attention (2025), arXiv:2512.02556; HISA; TokenSelect, arXiv:2411.02886"
    equation = "y_i = softmax(q_i k_J^T / sqrt(D)) v_J W_o, J: the top_k keys j by sum_h w_ih relu(q'_ih k'_j)"
    alternatives = {
        "num_heads": 2,
        "head_dim": 16,
        "num_kv_heads": 1,
        "position": "rotary",
        "rope_theta": 100.0,
        "top_k": 3,
        "indexer": "vote",
        "index_heads": 2,
        "index_dim": 8,
        "block_size": 3,
        "candidates": 2,
    }
    requires = {
        **CachedAttention.requires,
        "block_size": {"indexer": "hierarchical", "candidates": 2, "top_k": 4},
        "candidates": {"indexer": "hierarchical", "block_size": 3, "top_k": 6},
    }
    aux_losses = {"indexer": ("index_",)}

    def __init__(
        self,
        dim: int,
        *,
        top_k: Size = 256,
        indexer: Literal["flat", "hierarchical", "vote"] = "flat",
        index_heads: Size = 4,
        index_dim: Size = 32,
        block_size: Tile = 64,
        candidates: Size = 16,
        **options: Unpack[CachedOptions],
    ) -> None:
        super().__init__(dim, **options)
        self.top_k, self.indexer, self.block_size, self.candidates = top_k, indexer, block_size, candidates
        self.index_heads, self.index_dim = index_heads, index_dim
        voted = indexer == "vote"
        self.index_q = None if voted else nn.Linear(dim, index_heads * index_dim, bias=False)
        self.index_k = None if voted else nn.Linear(dim, index_dim, bias=False)
        self.index_weight = None if voted else nn.Linear(dim, index_heads, bias=False)
        self._reset_indexer()

    def reset_parameters(self) -> None:
        """As in `attention`; the indexer with standard deviation C ** -0.5, so that its scores have about unit size."""
        super().reset_parameters()
        if hasattr(self, "index_q"):  # the constructor of `attention` calls this before there is an indexer
            self._reset_indexer()

    def _reset_indexer(self) -> None:
        for layer in (self.index_q, self.index_k, self.index_weight):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)

    def index_of(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Queries (B, N, J, E), keys (B, N, E) and weights (B, N, J) of the indexer, of tokens without their graph."""
        if self.index_q is None or self.index_k is None or self.index_weight is None:
            return None
        tokens = tokens.detach()
        weights = self.index_weight(tokens) * (self.index_heads * self.index_dim) ** -0.5
        return self.index_q(tokens).unflatten(-1, (self.index_heads, self.index_dim)), self.index_k(tokens), weights

    def choose(
        self, q: Tensor, k: Tensor, index: tuple[Tensor, Tensor, Tensor] | None, until: Tensor, valid: Tensor | None
    ) -> Chosen:
        """The tokens for each query; `until` (B or 1, N) is the number of keys that it may see."""
        if index is None:
            return choose_by_vote(q, k, until, self.top_k, valid, self.head_dim**-0.5)
        if self.indexer == "flat":
            return choose_flat(*index, until, self.top_k, valid)
        return choose_hierarchical(*index, until, self.top_k, valid, block_size=self.block_size, blocks=self.candidates)

    def loss(self, q: Tensor, k: Tensor, index: tuple[Tensor, Tensor, Tensor], chosen: Chosen) -> Tensor:
        """Of the indexer: a mean over some queries, evenly spaced."""
        with torch.autocast(q.device.type, enabled=False):
            step = -(-q.shape[1] // _LOSS_QUERIES)
            ids, seen = chosen.ids[:, ::step], chosen.valid[:, ::step]
            rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
            q, k = q.detach()[:, ::step].float().unflatten(2, (self.num_kv_heads, -1)), k.detach().float()[rows, ids]
            scores = torch.einsum("bngpd,bnkgd->bngpk", q, k) * self.head_dim**-0.5
            scores = scores.masked_fill(~seen[:, :, None, None], -1e30)
            target = scores.softmax(-1).mean((2, 3))
            iq, ik, weights = (t.float() for t in index)
            guess = torch.einsum("bnje,bnke->bnjk", iq[:, ::step], ik[rows, ids]).relu()
            guess = torch.einsum("bnjk,bnj->bnk", guess, weights[:, ::step]).masked_fill(~seen, -1e30).log_softmax(-1)
            kept = seen & (target > 0)
            return torch.where(kept, target * (target.clamp_min(1e-30).log() - guess), 0.0).sum(-1).mean()

    def attend_chosen(self, q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, valid: Tensor | None) -> Tensor:
        """Outputs (B, N, H, D); queries that are not `valid` (B, N) get zeros, at no cost."""
        seen = chosen.valid if valid is None else chosen.valid & valid[..., None]
        y = block_sparse_attention(q, k, v, blocks_of_lists(chosen.ids[:, None], 1, 1, seen[:, None]))
        assert isinstance(y, Tensor)
        return y

    def attend(self, tokens: Tensor, valid: Tensor | None, beside: Tensor | None = None) -> Tensor:
        q, k, v = self.project(tokens, None)
        index = self.index_of(tokens)
        until = torch.arange(1, tokens.shape[1] + 1, device=q.device)[None]
        if not self.is_causal:
            until = torch.full_like(until, tokens.shape[1]) if valid is None else valid.sum(1)[:, None].expand_as(valid)
        chosen = self.choose(q, k, index, until, valid)
        y = self.attend_chosen(q, k, v, chosen, valid)
        if index is not None and self.training and torch.is_grad_enabled():
            aux_loss("indexer", self.loss(q, k, index, chosen))
        return y

    # -- streaming

    def init_state(  # type: ignore[override] - a state of its own
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> IndexedState:
        """An empty cache of 16 places, doubled when full."""
        keys = self.empty_keys(batch, 16, device, dtype)
        index = keys.new_zeros(batch, 16, 0 if self.indexer == "vote" else self.index_dim)
        length = torch.zeros(batch, device=keys.device, dtype=torch.int64)
        return IndexedState(keys, torch.zeros_like(keys), index, length, 0)

    def grown(self, state: IndexedState, needed: int) -> IndexedState:
        extra = doubled(state.keys.shape[1], needed) - state.keys.shape[1]
        if not extra:
            return state
        keys, values = (lengthened(t, extra) for t in (state.keys, state.values))
        return state._replace(keys=keys, values=values, index_keys=F.pad(state.index_keys, (0, 0, 0, extra)))

    def step(self, x_t: Tensor, state: IndexedState) -> tuple[Tensor, IndexedState]:  # type: ignore[override]
        state = self.grown(state, state.used + 1)
        q, k, v = self.project(x_t[:, None], state.length[:, None])
        index = self.index_of(x_t[:, None])
        keys, values, index_keys = state.keys, state.values, state.index_keys
        if torch.is_grad_enabled():
            keys, values, index_keys = keys.clone(), values.clone(), index_keys.clone()
        rows = torch.arange(x_t.shape[0], device=x_t.device)
        keys[rows, state.length], values[rows, state.length] = k[:, 0].to(keys.dtype), v[:, 0].to(values.dtype)
        if index is not None:
            index_keys[rows, state.length] = index[1][:, 0].to(index_keys.dtype)
            index = (index[0], index_keys, index[2])
        chosen = self.choose(q, keys, index, state.length[:, None] + 1, None)
        y = self.attend_chosen(q, keys.to(q.dtype), values.to(q.dtype), chosen, None)
        new = IndexedState(keys, values, index_keys, state.length + 1, state.used + 1)
        return self.proj(y.flatten(1)), new

    def extend(
        self, tokens: Tensor, valid: Tensor | None, state: IndexedState, beside: Tensor | None = None
    ) -> tuple[Tensor, IndexedState]:
        count, before = tokens.shape[1], state.length
        state = self.grown(state, state.used + count)
        place = before[:, None] + torch.arange(count, device=tokens.device)
        q, k, v = self.project(tokens, place)
        keys, values = appended(state.keys, k, before, valid), appended(state.values, v, before, valid)
        index, index_keys = self.index_of(tokens), state.index_keys
        used = state.used + count
        if index is not None:
            index_keys = appended(index_keys, index[1], before, valid)
            index = (index[0], index_keys[:, :used], index[2])
        chosen = self.choose(q, keys[:, :used], index, place + 1, None)
        y = self.attend_chosen(q, keys[:, :used].to(q.dtype), values[:, :used].to(q.dtype), chosen, valid)
        added = count if valid is None else valid.sum(1)
        return y, IndexedState(keys, values, index_keys, before + added, used)

"""Softmax attention.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head. `*grid` is (N,), (H, W) or
(T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ...schema import Base, Count, Size
from ..base import Mixer
from ..positions import (
    alibi_slopes,
    padding_last,
    positions_in_segment,
    put_back,
    reorder,
    rotate,
    segments,
    without_padding,
)
from .chunked_attention import Rule, attend, bias_of, weigh
from .key_value_cache import KeyValueCache, append, extend


class HeadOptions(TypedDict, total=False):
    """The options of `Attention` that all its descendants have."""

    causal: bool
    num_heads: Size | None
    head_dim: Size
    num_kv_heads: Size | None
    qkv_bias: bool
    proj_bias: bool
    qk_norm: bool
    rope_theta: Base


class Attention(Mixer, name="attention"):
    """Multi-head softmax attention over the tokens of a grid. Vaswani et al. (2017), arXiv:1706.03762.

    `y = proj(softmax(q k^T / sqrt(head_dim)) v)`. The width of the heads is free of `dim`, as in MetaFormer Baselines
    (2022, arXiv:2210.13452): `num_heads * head_dim` may differ from `dim`. CAFormer uses the defaults; a ViT uses
    `head_dim=64, qkv_bias=True, proj_bias=True`; Llama is `position="rotary"` with `causal`. Grids of more axes count
    as sequences in raster order where the order matters (causal, window, position).

    Args:
        dim: number of channels C.
        causal: a token sees only itself and those before it.
        num_heads: number of heads H; by default `max(1, dim // head_dim)`.
        head_dim: channels per head D.
        num_kv_heads: number of key-value heads G, a divisor of H, shared by H / G heads each; by default H.
            Grouped-query attention (2023), arXiv:2305.13245.
        qkv_bias: bias of the projection to queries, keys and values.
        proj_bias: bias of the output projection.
        qk_norm: RMS norm of queries and keys over D, with a weight. Query-Key Normalization (2020), arXiv:2010.04245.
        window: a token sees only those less than `window` positions away, itself included. Mistral (2023),
            arXiv:2310.06825.
        sink_tokens: number of tokens at the start that stay visible outside the window. StreamingLLM (2023),
            arXiv:2309.17453 (with positions in the text, not in the cache).
        position: "none"; "rotary" (RoFormer, arXiv:2104.09864); "alibi" (arXiv:2108.12409). None is the model's,
            or "none" where it says nothing.
        rope_theta: base of the rotary wavelengths.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool, False tokens are never attended to;
    `document_ids` `(B, *grid)`. The rows of `qkv.weight` are ordered queries (H, D), keys (G, D), values (G, D), which
    is (3, H, D) without grouping. The state of `step` is a `KeyValueCache`; with a window its size is constant.

    Raises:
        ConfigError: a size that is not positive, or options that do not go together.
    """

    causal = "can"
    masks = True
    packs = True
    streams = True
    complexity = "N^2"
    memory = "N"
    source = "Attention Is All You Need (2017), arXiv:1706.03762"
    equation = "y = softmax(q k^T / sqrt(D)) v W_o"
    alternatives = {
        "num_heads": 2,
        "head_dim": 16,
        "num_kv_heads": 1,
        "window": 3,
        "sink_tokens": 1,
        "position": "rotary",
        "rope_theta": 100.0,
    }
    requires = {
        "num_kv_heads": {"num_heads": 2},
        "sink_tokens": {"window": 3},
        "rope_theta": {"position": "rotary"},
    }

    form = "softmax"  # of the weights, see `chunked_attention.weigh`

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        num_heads: Size | None = None,
        head_dim: Size = 32,
        num_kv_heads: Size | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool = False,
        window: Size | None = None,
        sink_tokens: Count = 0,
        position: Literal["none", "rotary", "alibi"] | None = None,
        rope_theta: Base = 10000.0,
    ) -> None:
        super().__init__()
        self.num_heads = max(1, dim // head_dim) if num_heads is None else num_heads
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        if self.num_heads % self.num_kv_heads:
            raise OptionError("num_kv_heads", f"{num_kv_heads} does not divide the number of heads, {self.num_heads}.")
        if sink_tokens and window is None:
            raise OptionError("sink_tokens", f"{sink_tokens} needs a window; without one all tokens stay visible.")
        if position == "rotary" and head_dim % 2:
            raise OptionError("head_dim", f"{head_dim} is odd; rotary positions need pairs of channels.")
        self.is_causal = causal
        self.head_dim = head_dim
        self.window = window
        self.sink_tokens = sink_tokens
        self.position = position or "none"
        self.rope_theta = rope_theta
        self.qkv = nn.Linear(dim, (self.num_heads + 2 * self.num_kv_heads) * head_dim, bias=qkv_bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(self.num_heads * head_dim, dim, bias=proj_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02 and zero biases, as in ViT and MetaFormer Baselines."""
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                nn.init.ones_(norm.weight)

    def rule(self, device: torch.device) -> Rule:
        """Which tokens see which."""
        slopes = alibi_slopes(self.num_heads, device) if self.position == "alibi" else None
        return Rule(self.is_causal, self.window, self.sink_tokens, slopes)

    def project(
        self, tokens: Tensor, positions: Tensor | None, beside: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, H, D), keys and values (B, N, G, D) of tokens (B, N, C), with their positions applied.

        `beside` (B, N, ...) is what a subclass has of every token besides its channels; it was moved with the tokens.
        """
        groups = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(tokens).unflatten(-1, (-1, self.head_dim)).split(groups, -2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.position == "rotary":
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        return q, k, v

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return self.mixed(x, None, mask, document_ids)

    def mixed(self, x: Tensor, beside: Tensor | None, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
        """As `forward`; `beside` (B, *grid, ...) as in `project`."""
        self.check_grid(x)
        tokens, rule = x.flatten(1, -2), self.rule(x.device)
        beside = None if beside is None else beside.flatten(1, x.ndim - 2)
        segment = None if document_ids is None else segments(document_ids.flatten(1))
        order = valid = None
        if mask is not None:
            valid = mask.flatten(1)
            tokens = without_padding(tokens, valid)
            beside = None if beside is None else without_padding(beside, valid)
            if not self.is_causal:
                # a row without any real token sees everything: no softmax is empty, so no NaN
                valid = valid | ~valid.any(1, keepdim=True)
            if self.is_causal or self.window is not None or self.position != "none" or segment is not None:
                # Padding goes to the end. There causality alone hides it, and positions and windows do not count it.
                order = padding_last(valid)
                tokens = reorder(tokens, order)
                beside = None if beside is None else reorder(beside, order)
                segment = None if segment is None else reorder(segment, order)
                valid = None if self.is_causal and segment is None else reorder(valid, order)
        positions = None if segment is None else positions_in_segment(segment)
        if segment is not None and valid is not None:
            # padding is a document of its own, so that each of its tokens sees something
            segment, valid = torch.where(valid, segment, -1), None
        q, k, v = self.project(tokens, positions, beside)
        y = attend(q, k, v, rule, form=self.form, positions=positions, segment=segment, valid=valid)
        y = self.proj(y.flatten(2))
        if order is not None:
            y = put_back(y, order)
        return y.reshape(*x.shape[:-1], -1)

    # -- streaming

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueCache:
        """An empty cache, of `sink_tokens + window` slots, or without a window of 16 that double when they are full."""
        if not self.is_causal:
            raise ConfigError('mixer "attention" streams only when it is causal.')
        size = 16 if self.window is None else self.sink_tokens + self.window
        where = self.memory_format(device, dtype)
        shape = (batch, size, self.num_kv_heads, self.head_dim)
        keys, values = torch.zeros(shape, **where), torch.zeros(shape, **where)
        positions = torch.full((batch, size), -1, device=where["device"])
        return KeyValueCache(keys, values, positions, torch.zeros(batch, device=where["device"], dtype=torch.int64), 0)

    def step(self, x_t: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        return self.stepped(x_t, None, state)

    def stepped(self, x_t: Tensor, beside: Tensor | None, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        """As `step`; `beside` (B, ...) as in `project`."""
        rule, query = self.rule(x_t.device), state.length[:, None]
        q, k, v = self.project(x_t[:, None], query, None if beside is None else beside[:, None])
        state = append(state, k[:, 0], v[:, 0], rule)
        keys, values = (t[:, : state.used].transpose(1, 2).to(q.dtype) for t in (state.keys, state.values))
        key = state.positions[:, : state.used]
        bias = bias_of(rule, query, key, (key >= 0)[:, None])
        # the heads that share keys become queries of one head
        group = self.num_heads // self.num_kv_heads
        if rule.slopes is not None:
            bias = bias.unflatten(1, (self.num_kv_heads, group)).squeeze(-2).to(q.dtype)
        q = q[:, 0].unflatten(1, (self.num_kv_heads, group))
        y = weigh(q, keys, values, bias, form=self.form)
        return self.proj(y.flatten(1)), state

    def prefill(
        self, x: Tensor, *, mask: Tensor | None = None, state: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        return self.read(x, None, mask, state)

    def read(
        self, x: Tensor, beside: Tensor | None, mask: Tensor | None, state: KeyValueCache | None
    ) -> tuple[Tensor, KeyValueCache]:
        """As `prefill`; `beside` (B, N, ...) as in `project`."""
        rule, (batch, length) = self.rule(x.device), x.shape[:2]
        fresh = state is None
        if state is None:
            state = self.init_state(batch, device=x.device, dtype=x.dtype)
        order = None if mask is None else padding_last(mask)
        tokens = x if order is None else reorder(without_padding(x, mask), order)
        if beside is not None and order is not None:
            beside = reorder(without_padding(beside, mask), order)
        added = state.length.new_full((batch,), length) if mask is None else mask.sum(1)
        index = torch.arange(length, device=x.device)[None]
        positions = index if fresh else state.length[:, None] + index
        q, k, v = self.project(tokens, positions, beside)
        if fresh:
            y = attend(q, k, v, rule, form=self.form)
        else:
            keys, values = torch.cat([state.keys.to(k.dtype), k], 1), torch.cat([state.values.to(v.dtype), v], 1)
            key_positions = torch.cat([state.positions, positions], 1)
            y = attend(
                q, keys, values, rule,
                form=self.form, positions=positions, key_positions=key_positions, valid=key_positions >= 0,
            )  # fmt: skip
        y = self.proj(y.flatten(2))
        return (y if order is None else put_back(y, order)), extend(state, k, v, rule, added)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's and sail-sg's MetaFormer attention: same names and layouts, `(3, H, D)` rows of `qkv.weight`."""
        return {name: tensor for name, tensor in state_dict.items() if name.startswith(("qkv.", "proj."))}

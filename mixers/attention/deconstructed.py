"""Attention with one of its principles taken away at a time.

Axis letters: B batch, N tokens, C channels, H heads, D channels per head. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ...schema import Size
from .attention import Attention
from .key_value_cache import KeyValueCache


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Sinusoidal position code (..., dim) of integer positions (...). Vaswani et al. (2017), arXiv:1706.03762."""
    half = (dim + 1) // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=positions.device) / half)
    angle = positions.to(torch.float32)[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :dim]


class Deconstructed(Attention, name="deconstructed"):
    """Attention with one of its principles taken away or replaced. Deconstructing Attention (2025), arXiv:2510.11602.

    Everything but the principle in question (projections, heads, initial values) is that of `attention`:

    - "standard": attention itself, the control.
    - "fixed_sequence": no dependence on the sequence. Queries and keys are projections of a fixed sinusoidal code of
      the positions, so the weights are the same for all inputs.
    - "static_embedding": queries and keys are projections of the token embeddings in place of the current layer. The
      language backbone passes these as `embeddings`; where none are passed, as in a first layer, they are `x` itself.
    - "linear": no softmax. The weights are products of elu(q) + 1 and elu(k) + 1, normalised.
    - "none": no mixing. A token sees only itself.

    The paper's names are FixedSeqQK, StaticEmbQK, Approximate (of which this is one form) and MLP.

    Args:
        dim: number of channels C.
        causal: a token sees only itself and those before it.
        variant: see above.
        num_heads: number of heads H; by default `max(1, dim // head_dim)`.
        head_dim: channels per head D.
        position: "none", "rotary" or "alibi" as in `attention`.

    Shapes: as `attention`; `embeddings` has the shape of `x`.

    Raises:
        ConfigError: unknown variant, or an option that `attention` refuses.
    """

    memory = "N^2"
    source = "Deconstructing Attention (2025), arXiv:2510.11602"
    equation = "y = a(q k^T / sqrt(D)) v W_o, q and k from tokens, positions or embeddings, a softmax or linear"
    alternatives = {"variant": "fixed_sequence", "num_heads": 2, "head_dim": 16, "position": "rotary"}
    requires = {"embeddings": {"variant": "static_embedding"}}
    reads_embeddings = True

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        variant: Literal["standard", "fixed_sequence", "static_embedding", "linear", "none"] = "standard",
        num_heads: Size | None = None,
        head_dim: Size = 32,
        position: Literal["none", "rotary", "alibi"] | None = None,
    ) -> None:
        # a window of one token is no mixing
        window = 1 if variant == "none" else None
        super().__init__(dim, causal=causal, num_heads=num_heads, head_dim=head_dim, position=position, window=window)
        self.dim, self.variant = dim, variant
        self.form = "linear" if variant == "linear" else "softmax"

    def project(
        self, tokens: Tensor, positions: Tensor | None, beside: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.variant == "fixed_sequence":
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            beside = sinusoids(positions, self.dim).to(tokens.dtype).expand(tokens.shape)
        if beside is None:
            return super().project(tokens, positions)
        q, k, _ = super().project(beside, positions)
        return q, k, super().project(tokens, positions)[2]

    def _source(self, embeddings: Tensor | None) -> Tensor | None:
        """What queries and keys are made of in place of the tokens."""
        return embeddings if self.variant == "static_embedding" else None

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        return self.mixed(x, self._source(embeddings), mask, document_ids)

    def prefill(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: KeyValueCache | None = None,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        return self.read(x, self._source(embeddings), mask, state)

    def step(self, x_t: Tensor, state: Any, *, embeddings: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.stepped(x_t, self._source(embeddings), state)

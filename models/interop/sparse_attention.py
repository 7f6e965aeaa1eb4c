"""Sparse attention for Hugging Face models, without training: `use_sparse_attention(model)`.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ConfigError, unknown
from ...kernels import block_sparse_attention, blocks_of_mask
from ...mixers.attention.block_selection import mean_pooled_blocks
from ...mixers.attention.permutations import permuted_blocks

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError("sparse_attention needs transformers: pip install 'mixerzoo[text]'") from error

METHODS = ("permuted", "mean_pooling")


def use_sparse_attention(
    model: PreTrainedModel,
    *,
    method: Literal["permuted", "mean_pooling"] = "permuted",
    threshold: float = 0.9,
    block_size: int = 128,
    segment_size: int = 256,
) -> PreTrainedModel:
    """Replace the attention of a causal model at prefill by block-sparse attention; returns the model.

        use_sparse_attention(model, threshold=0.9)

    Prefill of more than one segment becomes sparse. Single tokens, pieces after a cache, shorter prompts, and layers
    whose mask is more than causality and padding (sliding windows) keep PyTorch's dense attention, which
    `model.set_attn_implementation("sdpa")` brings back everywhere.

    Args:
        model: any model of transformers that uses its attention interface.
        method: "permuted" is PBS-Attn (2025), arXiv:2510.21270; "mean_pooling" the same without sorting keys.
        threshold: pooled attention that the chosen blocks of other segments keep; 1 takes all, which is dense.
        block_size: tokens of a block.
        segment_size: tokens of a segment, a multiple of `block_size`; keys are sorted inside of it.

    Raises:
        ConfigError: an unknown method or sizes that do not fit.
    """
    if method not in METHODS:
        raise unknown("use_sparse_attention.method", method, METHODS)
    if not 0 < threshold <= 1:
        raise ConfigError(f"use_sparse_attention.threshold: {threshold} is not above 0 and at most 1.")
    if block_size < 1 or segment_size < block_size or segment_size % block_size:
        raise ConfigError(
            f"use_sparse_attention.segment_size: {segment_size} is not a multiple of block_size, {block_size}."
        )
    name = f"mixerzoo_{method}_{block_size}_{segment_size}_{threshold}".replace(".", "_")
    AttentionInterface.register(name, _attention(method, threshold, block_size, segment_size))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return model


def _padding(mask: Tensor | None, length: int) -> tuple[bool, Tensor | None]:
    """Whether a mask (B, 1, N, N) is causality and padding alone, and the real keys (B, N), None for all."""
    if mask is None:
        return True, None
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2:] != (length, length):
        return False, None
    real = mask[:, 0, -1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    # rows of padding see whatever they see: they are never looked at
    same = (mask[:, 0] == (causal & real[:, None])) | ~real[:, :, None]
    return bool(same.all()), real


def _attention(method: str, threshold: float, block_size: int, segment_size: int) -> Callable[..., Any]:
    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,  # transformers passes more than this; the dense attention gets it
    ) -> tuple[Tensor, None]:
        """q (B, H, N, D), k and v (B, G, M, D); returns (B, N, H, D)."""
        length = query.shape[2]
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = options.get("sliding_window")
        plain = causal and length == key.shape[2] and length > segment_size and not dropout
        plain = plain and query.shape[3] == value.shape[3] and (window is None or window >= length)
        plain = plain and options.get("softcap") is None and options.get("s_aux") is None
        plain = plain and options.get("position_bias") is None
        real = None
        if plain:
            plain, real = _padding(attention_mask, length)
        if not plain:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
            )
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        with torch.no_grad():
            sizes = {"block_size": block_size, "threshold": threshold}
            index = None
            if method == "permuted":
                found = permuted_blocks(q, k, segment_size=segment_size, **sizes)
                index, mask = found.index, found.mask
            else:
                mask, _ = mean_pooled_blocks(q, k, **sizes)
        y = block_sparse_attention(
            q, k, v, blocks_of_mask(mask, block_size, block_size),
            causal=True, key_mask=real, k_index=index, scale=scaling,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y, None

    return forward

"""Configuration and inputs of language models, and the checks of both.

Axis letters: B batch, N tokens, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...kernels.common.dispatch import wants_plain
from ...mixers.part import stated
from ...schema import Count, Depth, Probability, Size
from ..parts.blocks import InitStd, LayerScale
from ..parts.language_heads import LANGUAGE_HEADS, LanguageHead


@dataclass(kw_only=True)
class LanguageConfig:
    """Configuration of a `Language` model. A part is a name or a mapping with `name` and options.

    Attributes:
        vocab_size: number of tokens V.
        dim: channels C.
        depth: number of blocks.
        mixer: token mixer, or a pattern of them that is repeated to the depth.
        channel_mixer: channel mixer; None for blocks without one, as in Mamba.
        norm: norm of the blocks and the last norm.
        norm_placement: "pre", or "post" as in BERT, which has a norm after the embedding instead of a last one.
        causal: a decoder, else a bidirectional encoder. Mixers that are always causal may stand in both.
        position: "none"; "learned", a table of `sequence_length` positions; "rotary" or "alibi", given to all mixers
            of the pattern that have the option `position` and leave it at its default; a warning says when none has.
        sequence_length: longest sequence, for the table and for mixers whose parameters depend on the length.
        objective: the head, by name: "causal_lm" and "masked_lm" give logits (B, N, V), "classify" (B, K), "features"
            (B, N, C); "reconstruct" gives logits (B, N, V) of the input from the features at the last position alone.
        tie_embeddings: the head's matrix is that of the token embedding.
        num_classes: classes K of "classify".
        pool: "mean", "last" or "first": how "classify" pools.
        head_act: activation in the head of "masked_lm".
        type_vocab_size: rows of a table of token types, of which row 0 is used where no types are given; 0 for none.
        embedding_projection: a linear layer after the embedding, as in FNet.
        dropout: probability after the embedding and after each branch.
        drop_path: stochastic depth of the last block; earlier blocks have proportionally less.
        layer_scale: initial value of the learnable scales of the branches; None for no scale.
        init_std: deviation of the initial weights of the embeddings, the head and the channel mixers; None for
            `fan_in ** -0.5` (C of an embedding, so that tied logits start at unit size), for narrow models, in which
            0.02 leaves embeddings and channel mixers far below a mixer that starts at full strength.
    """

    vocab_size: Size
    dim: Size
    depth: Depth
    mixer: Any
    channel_mixer: Any = None
    norm: Any = "rms_norm"
    norm_placement: Literal["pre", "post"] = "pre"
    causal: bool = True
    position: Literal["none", "learned", "rotary", "alibi"] = "none"
    sequence_length: Size | None = None
    objective: str = "causal_lm"
    tie_embeddings: bool = True
    num_classes: Count = 0
    pool: Literal["mean", "last", "first"] = "mean"
    head_act: str = "gelu"
    type_vocab_size: Count = 0
    embedding_projection: bool = False
    dropout: Probability = 0.0
    drop_path: Probability = 0.0
    layer_scale: LayerScale | None = None
    init_std: InitStd | None = 0.02


def check_config(config: LanguageConfig) -> None:
    """Raise an OptionError for combinations that make no sense."""
    name, _ = LANGUAGE_HEADS.check(config.objective, key="objective")
    needed = stated(LANGUAGE_HEADS.entries[name], "causal_model", LanguageHead)
    if needed is not None and needed != config.causal:
        why = "; an encoder sees the token it should predict." if needed else "."
        raise OptionError("objective", f"{name} needs causal={str(needed).lower()}{why}")
    if config.position == "learned" and config.sequence_length is None:
        raise OptionError("sequence_length", "position=learned needs the length of its table.")


def check_inputs(input_ids: Any, mask: Tensor | None, document_ids: Tensor | None, vocab_size: int) -> None:
    """Hold inputs of a language model against what it takes.

    The range of the ids is checked on the CPU only, where it costs nothing next to the model; a GPU would have to wait
    for it, and reports an id out of range by itself, if less clearly.

    Raises:
        ConfigError: not a tensor, another rank or dtype, empty, ids out of range, or a mask or document ids of another
            shape.
    """
    if isinstance(input_ids, (list, tuple)):
        lengths = {len(row) if isinstance(row, (list, tuple, Tensor)) else -1 for row in input_ids}
        why = f"rows of mixed lengths {sorted(lengths)} without a mask: " if len(lengths) > 1 else ""
        raise ConfigError(
            f"input_ids: {why}a tensor (B, N) is needed, not a list; pad_prompts(rows) makes one, and its mask."
        )
    shape = tuple(input_ids.shape)
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"input_ids: integers of shape (B, N) are needed, not {input_ids.dtype} of shape {shape}.")
    if input_ids.numel() == 0:
        raise ConfigError(f"input_ids: the input is empty, of shape {shape}.")
    if torch.compiler.is_compiling() or wants_plain():  # which know no values
        return
    if input_ids.device.type == "cpu":
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ConfigError(
                f"input_ids: the token id {low if low < 0 else high} is out of range; the vocabulary has the ids "
                f"0 to {vocab_size - 1}."
            )
    for name, tensor in (("mask", mask), ("document_ids", document_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ConfigError(f"{name}: shape {tuple(tensor.shape)} is not that of the ids, {shape}.")
    if mask is not None and mask.dtype != torch.bool:
        raise ConfigError(f"mask: bool is needed, True for real tokens, not {mask.dtype}.")

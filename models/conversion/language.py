"""Released weights of language models: transformers' and state-spaces' Mamba and Mamba-2, Llama-shaped, FNet.

Axis letters: C channels, H heads, G key-value heads, D channels per head, E hidden channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .language_facts import fnet_facts, llama_facts, mamba_facts
from .layouts import StateDict
from .rules import convert_mixers, has_keys, join, register_family, rename

_MAMBA_LAYER, _LLAMA_LAYER, _FNET_LAYER = (
    r"backbone\.layers\.(\d+)\.",
    r"model\.layers\.(\d+)\.",
    r"encoder\.layer\.(\d+)\.",
)
_OURS = r"blocks.\1."


def _known(named: Mapping[str, Tensor], *more: str) -> StateDict:
    """Without what belongs to the whole model and has no place in ours, such as a pooler."""
    return {k: v for k, v in named.items() if k.startswith(("embedding.", "norm.", "blocks.", "lm_head.", *more))}


def _with_head(named: StateDict, config: Mapping[str, Any]) -> StateDict:
    """The matrix of the head: left out where it is the embedding's, copied where only the embedding is in the file."""
    head, embedding = named.pop("lm_head.weight", None), named["embedding.weight"]
    if config.get("objective", "causal_lm") != "causal_lm":
        return named
    if not config.get("tie_embeddings", True):
        named["head.weight"] = embedding if head is None else head
    elif head is not None and not torch.equal(head, embedding):
        raise ConfigError(
            "checkpoint: its head is not the matrix of its embedding; build the model with tie_embeddings=false."
        )
    return named


def _convert_mamba(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    rules = [
        (r"backbone\.embeddings?\.(.+)", r"embedding.\1"),  # transformers writes `embeddings`, state-spaces `embedding`
        (r"backbone\.norm_f\.(.+)", r"norm.\1"),
        (_MAMBA_LAYER + r"norm\.(.+)", _OURS + r"norm1.\2"),
        (_MAMBA_LAYER + r"(mixer\..+)", _OURS + r"\2"),
    ]
    first = {
        int(k.split(".")[2]) for k in tensors if k.endswith(".mixer.x_proj.weight")
    }  # layers of Mamba, not Mamba-2
    named = convert_mixers(_known(rename(tensors, rules)), lambda layer: "mamba" if layer in first else "mamba2")
    return _with_head(named, config)


def _convert_llama(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    rules = [
        (r"model\.embed_tokens\.(.+)", r"embedding.\1"),
        (r"model\.norm\.(.+)", r"norm.\1"),
        (_LLAMA_LAYER + r"input_layernorm\.(.+)", _OURS + r"norm1.\2"),
        (_LLAMA_LAYER + r"post_attention_layernorm\.(.+)", _OURS + r"norm2.\2"),
        (_LLAMA_LAYER + r"self_attn\.o_proj\.(.+)", _OURS + r"mixer.proj.\2"),
        (_LLAMA_LAYER + r"self_attn\.([qkv]_(?:norm|proj)\..+)", _OURS + r"mixer.\2"),
        (_LLAMA_LAYER + r"mlp\.down_proj\.(.+)", _OURS + r"channel_mixer.fc2.\2"),
        (_LLAMA_LAYER + r"mlp\.(.+)", _OURS + r"channel_mixer.\2"),
        (_LLAMA_LAYER + r"(.+)", _OURS + r"\2"),
    ]
    named = rename({k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}, rules)
    named = join(named, r"(.+)\.(?P<part>[qkv])_proj\.(weight|bias)", r"\1.qkv.\3", "qkv")
    named = join(named, r"(.+)\.(?P<part>gate|up)_proj\.(weight|bias)", r"\1.fc1.\3", ("gate", "up"))
    return _with_head(_known(named), config)


def _convert_fnet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """The pooler is left out: it belongs to the next-sentence head."""
    rules = [
        (r"embeddings\.word_embeddings\.(.+)", r"embedding.\1"),
        (r"embeddings\.position_embeddings\.(.+)", r"position.\1"),
        (r"embeddings\.token_type_embeddings\.(.+)", r"token_type.\1"),
        (r"embeddings\.LayerNorm\.(.+)", r"embedding_norm.\1"),
        (r"embeddings\.projection\.(.+)", r"projection.\1"),
        (_FNET_LAYER + r"fourier\.output\.LayerNorm\.(.+)", _OURS + r"norm1.\2"),
        (_FNET_LAYER + r"intermediate\.dense\.(.+)", _OURS + r"channel_mixer.fc1.\2"),
        (_FNET_LAYER + r"output\.dense\.(.+)", _OURS + r"channel_mixer.fc2.\2"),
        (_FNET_LAYER + r"output\.LayerNorm\.(.+)", _OURS + r"norm2.\2"),
        (_FNET_LAYER + r"(.+)", _OURS + r"\2"),
        (r"cls\.predictions\.transform\.dense\.(.+)", r"head.dense.\1"),
        (r"cls\.predictions\.transform\.LayerNorm\.(.+)", r"head.norm.\1"),
        (r"cls\.predictions\.bias", "head.decoder.bias"),
    ]
    named = rename({k.removeprefix("fnet."): v for k, v in tensors.items()}, rules)
    head = ("head.",) if config.get("objective") == "masked_lm" else ()
    return _known(named, "position.", "token_type.", "embedding_norm.", "projection.", *head)


register_family(
    "transformers or state-spaces Mamba",
    "language",
    has_keys(r"backbone\.layers\.0\.mixer\.A_log$"),
    _convert_mamba,
    facts=mamba_facts,
)
register_family(
    "transformers Llama",
    "language",
    has_keys(r"model\.layers\.0\.self_attn\.q_proj\.weight$"),
    _convert_llama,
    facts=llama_facts,
)
register_family(
    "transformers FNet",
    "language",
    has_keys(r".*encoder\.layer\.0\.fourier\.output\.LayerNorm\.weight$"),
    _convert_fnet,
    facts=fnet_facts,
)

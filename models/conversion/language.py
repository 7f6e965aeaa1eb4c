"""Released weights of language models: transformers' and state-spaces' Mamba and Mamba-2, Llama-shaped, FNet.

Axis letters: C channels, H heads, G key-value heads, D channels per head, E hidden channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mixers import mixer_class
from .language_facts import fnet_facts, llama_facts, mamba_facts
from .layouts import Layout, StateDict, register_layout


def _is_language(config: Mapping[str, Any]) -> bool:
    return config.get("backbone") == "language"


def _head(state: Mapping[str, Tensor], ours: StateDict, config: Mapping[str, Any], embedding: str, head: str) -> None:
    """The matrix of the head: left out where it is the embedding's, copied where only the embedding is in the file."""
    tied = config.get("tie_embeddings", True)
    if config.get("objective", "causal_lm") != "causal_lm":
        return
    if not tied:
        ours["head.weight"] = state.get(head, state[embedding])
    elif head in state and not torch.equal(state[head], state[embedding]):
        raise ConfigError(
            "checkpoint: its head is not the matrix of its embedding; build the model with tie_embeddings=false."
        )


def _mamba_keys(keys: set[str], config: Mapping[str, Any]) -> bool:
    return _is_language(config) and "backbone.layers.0.mixer.A_log" in keys


def _convert_mamba(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    # transformers writes `embeddings`, state-spaces `embedding`
    embedding = "backbone.embeddings.weight" if "backbone.embeddings.weight" in state else "backbone.embedding.weight"
    ours: StateDict = {"embedding.weight": state[embedding], "norm.weight": state["backbone.norm_f.weight"]}
    layers: dict[int, StateDict] = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"backbone\.layers\.(\d+)\.mixer\.(.+)", key):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := re.fullmatch(r"backbone\.layers\.(\d+)\.norm\.weight", key):
            ours[f"blocks.{match[1]}.norm1.weight"] = tensor
    for i, mixer in layers.items():
        kind = mixer_class("mamba" if "x_proj.weight" in mixer else "mamba2")
        ours.update({f"blocks.{i}.mixer.{name}": tensor for name, tensor in kind.convert_official(mixer).items()})
    _head(state, ours, config, embedding, "lm_head.weight")
    return ours


def _llama_keys(keys: set[str], config: Mapping[str, Any]) -> bool:
    return _is_language(config) and "model.layers.0.self_attn.q_proj.weight" in keys


_LLAMA_LAYER = {
    "input_layernorm.weight": "norm1.weight",
    "post_attention_layernorm.weight": "norm2.weight",
    "self_attn.o_proj.weight": "mixer.proj.weight",
    "self_attn.o_proj.bias": "mixer.proj.bias",
    "self_attn.q_norm.weight": "mixer.q_norm.weight",
    "self_attn.k_norm.weight": "mixer.k_norm.weight",
    "mlp.down_proj.weight": "channel_mixer.fc2.weight",
}


def _convert_llama(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    ours: StateDict = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
    }
    packed: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        if match is None:
            continue
        block, name = f"blocks.{match[1]}", match[2]
        if name in _LLAMA_LAYER:
            ours[f"{block}.{_LLAMA_LAYER[name]}"] = tensor
        elif part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", name):
            packed.setdefault(f"{block}.mixer.qkv.{part[2]}", {})[part[1]] = tensor
        elif part := re.fullmatch(r"mlp\.(gate|up)_proj\.weight", name):
            packed.setdefault(f"{block}.channel_mixer.fc1.weight", {})[part[1]] = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            ours[f"{block}.{name}"] = tensor  # unknown: reported as unexpected
    for key, parts in packed.items():
        order = ("q", "k", "v") if ".qkv." in key else ("gate", "up")
        ours[key] = torch.cat([parts[name] for name in order])
    _head(state, ours, config, "model.embed_tokens.weight", "lm_head.weight")
    return ours


def _fnet_keys(keys: set[str], config: Mapping[str, Any]) -> bool:
    return _is_language(config) and any(k.endswith("encoder.layer.0.fourier.output.LayerNorm.weight") for k in keys)


_FNET = {
    "embeddings.word_embeddings.weight": "embedding.weight",
    "embeddings.position_embeddings.weight": "position.weight",
    "embeddings.token_type_embeddings.weight": "token_type.weight",
}
_FNET_STEMS = {
    "embeddings.LayerNorm": "embedding_norm",
    "embeddings.projection": "projection",
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
}
_FNET_LAYER = {
    "fourier.output.LayerNorm": "norm1",
    "intermediate.dense": "channel_mixer.fc1",
    "output.dense": "channel_mixer.fc2",
    "output.LayerNorm": "norm2",
}


def _convert_fnet(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """The pooler is left out: it belongs to the next-sentence head."""
    ours: StateDict = {}
    for full, tensor in state.items():
        key = full.removeprefix("fnet.")
        stem, _, leaf = key.rpartition(".")
        if key in _FNET:
            ours[_FNET[key]] = tensor
        elif stem in _FNET_STEMS:
            ours[f"{_FNET_STEMS[stem]}.{leaf}"] = tensor
        elif match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem):
            ours[f"blocks.{match[1]}.{_FNET_LAYER.get(match[2], match[2])}.{leaf}"] = tensor
        elif key == "cls.predictions.bias":
            ours["head.decoder.bias"] = tensor
    if config.get("objective") != "masked_lm":
        ours = {k: v for k, v in ours.items() if not k.startswith("head.")}
    return ours


for _layout in (
    Layout("transformers or state-spaces Mamba", _mamba_keys, _convert_mamba, facts=mamba_facts),
    Layout("transformers Llama", _llama_keys, _convert_llama, facts=llama_facts),
    Layout("transformers FNet", _fnet_keys, _convert_fnet, facts=fnet_facts),
):
    register_layout(_layout)

"""Weights of the official MetaFormer repositories and of timm's port, in our names.

Sources of the layouts: sail-sg/poolformer, sail-sg/metaformer, timm.models.metaformer, timm.models.vision_transformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...mixers.registry import mixer_class
from ...schema import split_spec
from ..backbones.layers import per_stage
from .layouts import Layout, StateDict, register_layout

_BLOCK = re.compile(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(.+)")


def _stage_mixers(config: Mapping[str, Any]) -> list[str]:
    stages = len(config["depths"])
    return [
        split_spec(s, key="model.mixer", kind="mixer")[0] for s in per_stage(config["mixer"], stages, key="model.mixer")
    ]


def _block_entry(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Name and layout of an entry of a block outside of the mixer."""
    name = re.sub(r"^(layer_scale|res_scale)_?(\d)(\.scale)?$", r"\1\2", name)
    name = re.sub(r"^mlp\.", "channel_mixer.", name)
    if name.endswith("weight") and value.ndim == 4:
        value = value.flatten(1)
    return name, value


def convert_blocks(tensors: Mapping[str, Tensor], mixers: list[str], mixer_key: str = "token_mixer.") -> StateDict:
    """Entries `stages.i.j.*` or `stages.i.blocks.j.*` to ours, the mixers' by their own `convert_official`."""
    out: StateDict = {}
    inner: dict[tuple[int, str], StateDict] = {}
    for key, value in tensors.items():
        found = _BLOCK.fullmatch(key)
        if found is None:
            out[key] = value
            continue
        stage, prefix, name = int(found[1]), f"stages.{found[1]}.blocks.{found[2]}.", found[3]
        if name.startswith(mixer_key):
            inner.setdefault((stage, f"{prefix}mixer."), {})[name.removeprefix(mixer_key)] = value
        else:
            name, value = _block_entry(name, value)
            out[prefix + name] = value
    for (stage, prefix), part in inner.items():
        converted = mixer_class(mixers[stage]).convert_official(part) if stage < len(mixers) else part
        out.update({prefix + name: value for name, value in converted.items()})
    return out


def _head(key: str, *, mlp: bool) -> str:
    """timm's `head.fc.fc1` and the official `head.fc1` to ours."""
    if not mlp:
        return key
    inner = key.removeprefix("head.fc.").removeprefix("head.")
    return (
        {"fc1": "head.fc1", "norm": "head.fc_norm", "fc2": "head.fc"}[inner.split(".")[0]] + "." + inner.split(".")[1]
    )


def convert_timm_metaformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From `timm.models.metaformer`."""
    mlp = any(k.startswith("head.fc.fc1") for k in tensors)
    named = {_head(k, mlp=mlp) if k.startswith("head.fc.") else k: v for k, v in tensors.items()}
    return convert_blocks(named, _stage_mixers(config))


def convert_official_metaformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official repository of MetaFormer Baselines for Vision."""
    mlp = any(k.startswith("head.fc1") for k in tensors)
    named: StateDict = {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"downsample_layers\.(\d+)\.(.+)", key):
            name = found[2].replace("pre_norm", "norm").replace("post_norm", "norm")
            key = f"stem.{name}" if found[1] == "0" else f"stages.{found[1]}.downsample.{name}"
        elif key.startswith("norm."):
            key = f"head.{key}"
        elif key.startswith("head."):
            key = _head(key, mlp=True) if mlp else key.replace("head.", "head.fc.")
        named[key] = value
    return convert_blocks(named, _stage_mixers(config))


def convert_official_poolformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official repository of PoolFormer, where stages and downsampling alternate in one list."""
    named: StateDict = {}
    for key, value in tensors.items():
        if key.startswith("patch_embed.proj."):
            key = key.replace("patch_embed.proj", "stem.conv")
        elif found := re.fullmatch(r"network\.(\d+)\.proj\.(.+)", key):
            key = f"stages.{(int(found[1]) + 1) // 2}.downsample.conv.{found[2]}"
        elif found := re.fullmatch(r"network\.(\d+)\.(.+)", key):
            key = f"stages.{int(found[1]) // 2}.{found[2]}"
        elif key.startswith("norm."):
            key = f"head.{key}"
        elif key.startswith("head."):
            key = key.replace("head.", "head.fc.")
        named[key] = value
    return convert_blocks(named, _stage_mixers(config))


def convert_timm_vit(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From `timm.models.vision_transformer` with a class token and learned positions."""
    rename = {"cls_token": "class_token", "pos_embed": "position"}
    named: StateDict = {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            key = f"stages.{found[1]}.0.{found[2]}"
        elif key.startswith("patch_embed.proj."):
            key = key.replace("patch_embed.proj", "stem.conv")
        elif key.startswith("norm."):
            key = f"head.{key}"
        elif key.startswith("head."):
            key = key.replace("head.", "head.fc.")
        named[rename.get(key, key)] = value
    mixer = split_spec(config["mixer"], key="model.mixer", kind="mixer")[0]
    return convert_blocks(named, [mixer] * config["depth"], mixer_key="attn.")


def _timm_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm pools before the norm, and its MLP head has another eps than the official one."""
    given = config.get("head", "linear")
    head: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    head.update(norm={"name": "layer_norm", "eps": 1e-6}, norm_first=False)
    if head["name"] == "mlp":
        head["eps"] = 1e-6
    return {"head": head}


def _is_pyramid(config: Mapping[str, Any]) -> bool:
    return config.get("backbone") == "pyramid"


register_layout(
    Layout(
        "timm metaformer",
        lambda keys, config: (
            _is_pyramid(config)
            and any(
                re.match(r"stages\.\d+\.blocks\.\d+\.(mlp|token_mixer|res_scale1\.scale|layer_scale1\.scale)", k)
                for k in keys
            )
        ),
        convert_timm_metaformer,
        _timm_head,
    )
)
register_layout(
    Layout(
        "official MetaFormer baselines",
        lambda keys, config: (
            _is_pyramid(config)
            and "downsample_layers.0.conv.weight" in keys
            and any(re.match(r"stages\.\d+\.\d+\.mlp", k) for k in keys)
        ),
        convert_official_metaformer,
    )
)
register_layout(
    Layout(
        "official PoolFormer",
        lambda keys, config: _is_pyramid(config) and {"patch_embed.proj.weight", "network.0.0.mlp.fc1.weight"} <= keys,
        convert_official_poolformer,
    )
)
register_layout(
    Layout(
        "timm vision transformer",
        lambda keys, config: (
            config.get("backbone") == "isotropic" and {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= keys
        ),
        convert_timm_vit,
    )
)

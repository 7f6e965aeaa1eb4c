"""Weights of the official MetaFormer repositories and of timm's port, in our names.

Sources of the layouts: sail-sg/poolformer, sail-sg/metaformer, timm.models.metaformer, timm.models.vision_transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .layouts import StateDict
from .rules import (
    HEAD,
    PATCHES,
    POSITIONS,
    Rules,
    convert_mixers,
    has_keys,
    linear,
    mixer_by_block,
    mixer_by_stage,
    register_family,
    rename,
)


def _block(place: str, ours: str, mixer: str) -> Rules:
    """The entries of a block, from the pattern of its place and what stands there in our names."""
    return [
        (place + mixer + r"\.(?P<rest>.+)", ours + r"mixer.\g<rest>"),
        (place + r"(?P<kind>layer|res)_scale_?(?P<half>\d)(?:\.scale)?", ours + r"\g<kind>_scale\g<half>"),
        (place + r"mlp\.(?P<rest>.+)", ours + r"channel_mixer.\g<rest>"),
        (place + r"(?P<rest>.+)", ours + r"\g<rest>"),
    ]


_BLOCKS = _block(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.", r"stages.\1.blocks.\2.", "token_mixer")
_MLP_HEAD = [(r"head\.norm\.(.+)", r"head.fc_norm.\1"), (r"head\.fc2\.(.+)", r"head.fc.\1")]


def convert_timm_metaformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From `timm.models.metaformer`."""
    rules = [
        *_BLOCKS,
        (r"head\.fc\.fc1\.(.+)", r"head.fc1.\1"),
        (r"head\.fc\.norm\.(.+)", r"head.fc_norm.\1"),
        (r"head\.fc\.fc2\.(.+)", r"head.fc.\1"),
    ]
    return convert_mixers(linear(rename(tensors, rules)), mixer_by_stage(config))


def convert_official_metaformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official repository of MetaFormer Baselines for Vision."""
    rules = [
        (r"downsample_layers\.0\.(?:pre|post)_norm\.(.+)", r"stem.norm.\1"),
        (r"downsample_layers\.0\.(.+)", r"stem.\1"),
        (r"downsample_layers\.(\d+)\.(?:pre|post)_norm\.(.+)", r"stages.\1.downsample.norm.\2"),
        (r"downsample_layers\.(\d+)\.(.+)", r"stages.\1.downsample.\2"),
        *_BLOCKS,
        *_MLP_HEAD,
        *HEAD,
    ]
    return convert_mixers(linear(rename(tensors, rules)), mixer_by_stage(config))


def convert_official_poolformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official repository of PoolFormer, where stages and downsampling alternate in one list."""
    rules = [
        (r"network\.(\d+)\.proj\.(.+)", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv.{m[2]}"),
        (r"network\.(\d+)\.(.+)", lambda m: f"stages.{int(m[1]) // 2}.{m[2]}"),
        *PATCHES,
        *HEAD,
    ]
    return convert_mixers(linear(rename(rename(tensors, rules), _BLOCKS)), mixer_by_stage(config))


def convert_timm_vit(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From `timm.models.vision_transformer` with a class token and learned positions."""
    rules = [*_block(r"blocks\.(\d+)\.", r"stages.\1.blocks.0.", "attn"), *PATCHES, *POSITIONS, *HEAD]
    return convert_mixers(linear(rename(tensors, rules)), mixer_by_block(config))


def _timm_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm pools before the norm, and its MLP head has another eps than the official one."""
    given = config.get("head", "linear")
    head: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    head.update(norm={"name": "layer_norm", "eps": 1e-6}, norm_first=False)
    if head["name"] == "mlp":
        head["eps"] = 1e-6
    return {"head": head}


register_family(
    "timm metaformer",
    "pyramid",
    has_keys(r"stages\.\d+\.blocks\.\d+\.(mlp|token_mixer|res_scale1\.scale|layer_scale1\.scale)"),
    convert_timm_metaformer,
    changes=_timm_head,
)
register_family(
    "official MetaFormer baselines",
    "pyramid",
    has_keys(r"downsample_layers\.0\.conv\.weight$", r"stages\.\d+\.\d+\.mlp"),
    convert_official_metaformer,
)
register_family(
    "official PoolFormer",
    "pyramid",
    has_keys(r"patch_embed\.proj\.weight$", r"network\.0\.0\.mlp\.fc1\.weight$"),
    convert_official_poolformer,
)
register_family(
    "timm vision transformer",
    "isotropic",
    has_keys(r"cls_token$", r"pos_embed$", r"blocks\.0\.attn\.qkv\.weight$"),
    convert_timm_vit,
)

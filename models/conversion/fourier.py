"""Weights of the official GFNet, AFNO and AFFNet repositories, in our names.

Sources of the layouts: raoyongming/GFNet, NVlabs/AFNO-transformer, microsoft/TokenMixers. Sparsifiner's are those of a
vision transformer; see `metaformer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .layouts import StateDict
from .rules import HEAD, PATCHES, POSITIONS, convert_mixers, has_keys, mixer_by_block, register_family, rename

_BLOCK, _OURS = r"blocks\.(\d+)\.", r"stages.\1.blocks.0."


def convert_official_gfnet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the isotropic models of GFNet and AFNO: blocks of `norm1`, `filter`, `norm2`, `mlp`."""
    single = [(_BLOCK + r"norm2\.(.+)", _OURS + r"norm.\2"), (_BLOCK + r"gamma", _OURS + "layer_scale")]
    rules = [
        (_BLOCK + r"filter\.(.+)", _OURS + r"mixer.\2"),
        (_BLOCK + r"mlp\.(.+)", _OURS + r"channel_mixer.\2"),
        *(single if config.get("block") == "single_skip" else []),  # its second norm has no number
        (_BLOCK + r"(.+)", _OURS + r"\2"),
        *PATCHES,
        *POSITIONS,
        *HEAD,
    ]
    return convert_mixers(rename(tensors, rules), mixer_by_block(config))


_AFFNET = [  # official prefix -> ours, in the order in which they are tried
    (r"conv_1\.block\.", r"stem.conv."),
    (r"layer_1\.0\.", r"stem.blocks.0."),
    (r"conv_1x1_exp\.block\.", r"head.conv."),
    (r"classifier\.fc\.", r"head.fc."),
]
_INVERTED = {"exp_1x1": "expand", "conv_3x3": "depthwise", "red_1x1": "reduce"}


def _affnet_key(key: str, depths: list[int]) -> str:
    for theirs, ours in _AFFNET:
        key = re.sub(f"^{theirs}", ours, key)
    if found := re.match(r"layer_2\.(\d+)\.", key):
        key = f"stem.blocks.{int(found[1]) + 1}.{key[found.end() :]}"
    elif found := re.match(r"layer_([345])\.([01])\.", key):
        stage, rest = int(found[1]) - 2, key[found.end() :]
        if found[2] == "0":
            key = f"stages.{stage}.downsample.{rest}"
        elif inner := re.match(r"global_rep\.(\d+)\.", rest):
            number, rest = int(inner[1]), rest[inner.end() :]
            last = stage < len(depths) and number == depths[stage]
            key = f"stages.{stage}." + (f"fusion.norm.{rest}" if last else f"blocks.{number}.{rest}")
            key = key.replace(".filter.", ".mixer.").replace(".mlp.", ".channel_mixer.")
        else:
            rest = rest.replace("conv_proj.block.", "fusion.project.").replace("fusion.block.", "fusion.joint.")
            key = f"stages.{stage}.{rest}"
    return re.sub(r"\bblock\.(exp_1x1|conv_3x3|red_1x1)\.block\.", lambda m: f"{_INVERTED[m[1]]}.", key)


def convert_official_affnet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From AFFNet's classification models."""
    return {_affnet_key(key, list(config["depths"])): value for key, value in tensors.items()}


register_family(
    "official GFNet or AFNO", "isotropic", has_keys(r"pos_embed$", r"blocks\.0\.filter\."), convert_official_gfnet
)
register_family(
    "official AFFNet", "pyramid", has_keys(r"layer_5\.1\.conv_proj\.block\.conv\.weight$"), convert_official_affnet
)

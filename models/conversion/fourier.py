"""Weights of the official GFNet, AFNO and AFFNet repositories, in our names.

Sources of the layouts: raoyongming/GFNet, NVlabs/AFNO-transformer, microsoft/TokenMixers. Sparsifiner's are those of a
vision transformer; see `conversion_metaformer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...mixers.registry import mixer_class
from ...schema import split_spec
from .layouts import Layout, StateDict, register_layout


def _mixer_name(config: Mapping[str, Any]) -> str:
    spec = config["mixer"]
    return split_spec(spec[0] if isinstance(spec, list) else spec, key="model.mixer", kind="mixer")[0]


def convert_official_gfnet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the isotropic models of GFNet and AFNO: blocks of `norm1`, `filter`, `norm2`, `mlp`."""
    single = config.get("block") == "single_skip"  # its second norm has no number
    out: StateDict = {}
    filters: dict[str, StateDict] = {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.filter\.(.+)", key):
            filters.setdefault(f"stages.{found[1]}.blocks.0.mixer.", {})[found[2]] = value
            continue
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            name = found[2].replace("mlp.", "channel_mixer.")
            if single:
                name = name.replace("norm2.", "norm.").replace("gamma", "layer_scale")
            key = f"stages.{found[1]}.blocks.0.{name}"
        elif key.startswith("patch_embed.proj."):
            key = key.replace("patch_embed.proj", "stem.conv")
        elif key == "pos_embed":
            key = "position"
        elif key.startswith("norm."):
            key = f"head.{key}"
        elif key.startswith("head."):
            key = key.replace("head.", "head.fc.")
        out[key] = value
    for prefix, part in filters.items():
        converted = mixer_class(_mixer_name(config)).convert_official(part)
        out.update({prefix + name: value for name, value in converted.items()})
    return out


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


register_layout(
    Layout(
        "official GFNet or AFNO",
        lambda keys, config: (
            config.get("backbone") == "isotropic"
            and "pos_embed" in keys
            and any(key.startswith("blocks.0.filter.") for key in keys)
        ),
        convert_official_gfnet,
    )
)
register_layout(
    Layout(
        "official AFFNet",
        lambda keys, config: config.get("backbone") == "pyramid" and "layer_5.1.conv_proj.block.conv.weight" in keys,
        convert_official_affnet,
    )
)

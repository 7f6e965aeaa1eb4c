"""Weights of the MLP family in our names: timm's, and the official repositories'.

Sources of the layouts: timm.models.mlp_mixer, facebookresearch/deit (ResMLP), okojoalg/raft-mlp, JegZheng/MS-MLP,
Med-Process/Strip_MLP, Abdullah-88/NiNformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...schema import split_spec
from ..backbones.layers import per_stage
from .layouts import StateDict
from .rules import (
    HEAD,
    PATCHES,
    Rules,
    convert_mixers,
    has_keys,
    mixer_by_block,
    mixer_by_stage,
    next_stage,
    register_family,
    rename,
)

# -- timm.models.mlp_mixer and the official ResMLP

_BLOCK = r"blocks\.(\d+)\."
_OURS = r"stages.\1.blocks.0."
_ISOTROPIC: Rules = [
    *PATCHES,
    (_BLOCK + r"((?:mlp_tokens|linear_tokens|attn|mlp_channels\.gate)\..+)", _OURS + r"mixer.\2"),
    (_BLOCK + r"norm\.(.+)", _OURS + r"norm1.\2"),
    (_BLOCK + r"(?:mlp_channels|mlp)\.(.+)", _OURS + r"channel_mixer.\2"),
    (_BLOCK + r"(?:ls|gamma_)([12])", _OURS + r"layer_scale\2"),
    (_BLOCK + r"(.+)", _OURS + r"\2"),
    *HEAD,
]


def convert_isotropic(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From `timm.models.mlp_mixer` (Mixer, ResMLP, gMLP) or the official ResMLP."""
    rules = list(_ISOTROPIC)
    if any(".gate." in key for key in tensors):  # all of a gMLP block but its norm is the mixer
        rules.insert(0, (_BLOCK + r"(mlp_channels\..+)", _OURS + r"mixer.\2"))
    named = rename(tensors, rules)
    named = {k: v.flatten() if re.search(r"\.(alpha|beta)$", k) else v for k, v in named.items()}  # (1, 1, C)
    return convert_mixers(named, mixer_by_block(config))


# -- RaftMLP


def convert_raftmlp(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official `RaftMLP` with levels of type `ser_pm`, either embedding, without shortcut heads."""
    mixers = per_stage(config["mixer"], len(config["depths"]), key="model.mixer")
    rafts = [split_spec(m, key="model.mixer", kind="mixer")[1].get("raft_size", 2) for m in mixers]
    parts = [config.get("stem"), *per_stage(config.get("downsample"), len(mixers) - 1, key="model.downsample")]
    kernels = [split_spec(p, key="model.stem", kind="stem")[1].get("kernels", (4,)) for p in parts]
    out: StateDict = {}
    for key, value in tensors.items():
        level, _, name = key.removeprefix("levels.").partition(".")
        if not key.startswith("levels."):
            name = re.sub(r"^heads\.0\.1\.", "head.norm.", key)
            out[re.sub(r"^classifier\.", "head.fc.", name)] = value
            continue
        stem = "stem." if level == "0" else f"stages.{level}.downsample."
        if found := re.fullmatch(r"fn\.(?:0\.fc|1)\.(weight|bias)", name):
            if found[1] == "bias":
                out[stem + "convs.0.bias"] = value
                continue
            sides = kernels[int(level)]
            channels = value.shape[1] // sum(k * k for k in sides)
            for i, part in enumerate(value.split([channels * k * k for k in sides], 1)):
                # unfolded patches have the channel first, the plain embedding has it last
                side = sides[i]
                image = (
                    part.unflatten(1, (channels, side, side))
                    if name.startswith("fn.0")
                    else part.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
                )
                out[f"{stem}convs.{i}.weight"] = image.contiguous()
            continue
        found = re.fullmatch(r"fn\.(\d+)\.(\d)\.(.+)", name)
        if found is None:
            out[key] = value
            continue
        prefix = f"stages.{level}.blocks.{int(found[1]) - 2}."
        if found[2] == "5":
            for theirs, ours in (("norm.", "norm2."), ("fn.0.", "channel_mixer.fc1."), ("fn.3.", "channel_mixer.fc2.")):
                if found[3].startswith(theirs):
                    out[prefix + ours + found[3].removeprefix(theirs)] = value
        else:
            out[f"{prefix}mixer.{found[2]}.{found[3]}"] = value
            out[f"{prefix}mixer.raft_size"] = torch.tensor(rafts[int(level)])
    return convert_mixers(out, mixer_by_stage(config))


# -- MS-MLP


def convert_msmlp(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official MS-MLP, where the downsampling is the end of a stage."""
    block = r"layers\.(\d+)\.blocks\.(\d+)\."
    ours = r"stages.\1.blocks.\2."
    named = rename(
        tensors,
        [
            *PATCHES,
            (block + r"(dwconv_.+)", ours + r"mixer.\3"),
            (block + r"gamma", ours + "layer_scale"),
            (block + r"pwconv([12])\.(.+)", ours + r"channel_mixer.fc\3.\4"),
            (block + r"(.+)", ours + r"\3"),
            (r"layers\.(\d+)\.downsample\.proj\.(.+)", r"layers.\1.down.conv.\2"),
            (r"layers\.(\d+)\.downsample\.norm\.(.+)", r"layers.\1.down.norm.\2"),
            *HEAD,
        ],
    )
    moved = rename(named, [(r"layers\.(\d+)\.down\.(.+)", next_stage)])
    return convert_mixers(moved, mixer_by_stage(config))


# -- Strip-MLP

_SHORTCUTS = {"conv_s1_28": "1_2", "conv_s1_14": "1_3", "conv_s2_14": "2_3"}


def convert_stripmlp(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official Strip-MLP."""
    block, ours = r"blocks(\d)\.(\d+)\.", r"blocks\1.\2."
    named = rename(
        tensors,
        [
            (r"patch_embed\.(.+)", r"stem.conv.\1"),
            (r"norm\.(.+)", r"head.norm.norm.\1"),
            (r"merging(\d)\.(.+)", r"stages.\1.downsample.conv.\2"),
            (r"(conv_s\d_\d+)\.(.+)", lambda m: f"shortcut.convs.{_SHORTCUTS.get(m[1], m[1])}.{m[2]}"),
            (block + r"token_mixing\.dwsc\.conv_merge\.BN\.(.+)", ours + r"norm1.norm.\3"),
            (block + r"token_mixing\.(.+)", ours + r"mixer.\3"),
            (block + r"channel_mixing\.conv_77\.(.+)", ours + r"channel_mixer.conv.\3"),
            (block + r"channel_mixing\.layer_norm\.(.+)", ours + r"channel_mixer.norm.\3"),
            (block + r"channel_mixing\.(.+)", ours + r"channel_mixer.\3"),
            *HEAD,
        ],
    )
    named = rename(named, [(block + "(.+)", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{m[3]}")])
    named = {k: v.flatten() if k.endswith((".grn.gamma", ".grn.beta")) else v for k, v in named.items()}
    return convert_mixers(named, mixer_by_stage(config))


# -- NiNformer


def convert_ninformer(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official image classifier."""
    block, ours = r"model\.(\d+)\.", r"stages.\1.blocks.0."
    named = rename(
        tensors,
        [
            (r"patcher\.(.+)", r"stem.conv.\1"),
            (block + r"mgu\.(.+)", ours + r"mixer.\2"),
            (block + r"norm\.(.+)", ours + r"norm1.\2"),
            (block + r"ffn\.net\.0\.(.+)", ours + r"channel_mixer.fc1.\2"),
            (block + r"ffn\.net\.3\.(.+)", ours + r"channel_mixer.fc2.\2"),
            *HEAD,
        ],
    )
    return convert_mixers(named, mixer_by_block(config))


register_family(
    "timm mlp_mixer",
    "isotropic",
    has_keys(r"stem\.proj\.", r"blocks\.\d+\.(mlp_tokens|linear_tokens|mlp_channels\.gate)\."),
    convert_isotropic,
)
register_family(
    "official ResMLP",
    "isotropic",
    has_keys(r"patch_embed\.proj\.", r"blocks\.\d+\.gamma_1$", r"blocks\.\d+\.norm1\.alpha"),
    convert_isotropic,
)
register_family("official RaftMLP", "pyramid", has_keys(r"levels\.\d+\.fn\.\d+\.3\.fn\.0\."), convert_raftmlp)
register_family("official MS-MLP", "pyramid", has_keys(r"layers\.\d+\.blocks\.\d+\.dwconv_lr\."), convert_msmlp)
register_family(
    "official Strip-MLP", "pyramid", has_keys(r"blocks1\.\d+\.token_mixing\.smlp_block\."), convert_stripmlp
)
register_family("official NiNformer", "isotropic", has_keys(r"patcher\.", r"model\.\d+\.mgu\."), convert_ninformer)

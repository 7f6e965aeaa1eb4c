"""Weights of the official vision models of the state-space family in our names.

Sources of the layouts: MzeroMiko/VMamba, hustvl/Vim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...mixers.recurrent.ssm import Mamba
from .layouts import StateDict
from .rules import (
    HEAD,
    POSITIONS,
    convert_mixers,
    has_keys,
    linear,
    mixer_by_stage,
    next_stage,
    register_family,
    rename,
)

_VMAMBA_BLOCK, _BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."


def convert_vmamba(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official `VSSM`, channels first or last, where the downsampling is the end of a stage."""
    named = rename(
        tensors,
        [
            (r"patch_embed\.0\.(.+)", r"stem.layers.0.conv.\1"),
            (r"patch_embed\.2\.(.+)", r"stem.layers.0.norm.\1"),
            (r"patch_embed\.5\.(.+)", r"stem.layers.1.conv.\1"),
            (r"patch_embed\.7\.(.+)", r"stem.layers.1.norm.\1"),
            (_VMAMBA_BLOCK + r"norm\.(.+)", _BLOCK + r"norm1.\3"),
            (_VMAMBA_BLOCK + r"op\.(.+)", _BLOCK + r"mixer.\3"),
            (_VMAMBA_BLOCK + r"mlp\.(.+)", _BLOCK + r"channel_mixer.\3"),
            (_VMAMBA_BLOCK + r"(.+)", _BLOCK + r"\3"),
            (r"layers\.(\d+)\.downsample\.1\.(.+)", r"layers.\1.down.conv.\2"),
            (r"layers\.(\d+)\.downsample\.3\.(.+)", r"layers.\1.down.norm.\2"),
            (r"classifier\.norm\.(.+)", r"head.norm.\1"),
            (r"classifier\.head\.(.+)", r"head.fc.\1"),
        ],
    )
    moved = rename(named, [(r"layers\.(\d+)\.down\.(.+)", next_stage)])
    return convert_mixers(linear(moved), mixer_by_stage(config))


def convert_vim(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """From the official `VisionMamba` of type bimamba v2 with a class token in the middle."""
    named = rename(
        tensors,
        [
            (r"patch_embed\.proj\.(.+)", r"stem.conv.\1"),
            *POSITIONS,
            (r"norm_f\.(.+)", r"head.norm.\1"),
            (r"layers\.(\d+)\.norm\.(.+)", r"stages.\1.blocks.0.norm1.\2"),
            (r"layers\.(\d+)\.(mixer\..+)", r"stages.\1.blocks.0.\2"),
            *HEAD,
        ],
    )
    out: StateDict = {}
    for key, value in named.items():
        found = re.fullmatch(r"(stages\.\d+\.blocks\.0\.)mixer\.(.+)", key)
        if key == "position":
            # the entry of the class token comes first in ours
            at = (value.shape[1] - 1) // 2
            out[key] = torch.cat([value[:, at : at + 1], value[:, :at], value[:, at + 1 :]], 1)
        elif found is None:
            out[key] = value
        elif found[2].startswith(("in_proj.", "out_proj.")):
            layer, rest = found[2].split(".", 1)
            out[f"{found[1]}mixer.{'enter' if layer == 'in_proj' else 'leave'}.{rest}"] = value
        else:
            # "_b" marks what the way backwards has for itself: conv1d_b.weight, A_b_log
            name = re.sub(r"_b(?=\.|_log$|$)", "", found[2])
            path = int(name != found[2])
            for ours, converted in Mamba.convert_official({name: value}).items():
                out[f"{found[1]}mixer.mixers.{path}.{ours}"] = converted
    return out


register_family(
    "official VMamba",
    "pyramid",
    has_keys(r"layers\.\d+\.blocks\.\d+\.op\.A_logs", r"classifier\.head\."),
    convert_vmamba,
)
register_family(
    "official Vision Mamba",
    "isotropic",
    has_keys(r"cls_token$", r"layers\.\d+\.mixer\.A_b_log$", r"layers\.\d+\.mixer\.conv1d_b\."),
    convert_vim,
)

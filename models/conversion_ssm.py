"""Weights of the official vision models of the state-space family in our names.

Sources of the layouts: MzeroMiko/VMamba.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoint import StateDict
from .conversion import convert_mixers, has_keys, mixer_by_stage, register_family, rename

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
            (r"layers\.(\d+)\.downsample\.1\.(.+)", r"down.\1.conv.\2"),
            (r"layers\.(\d+)\.downsample\.3\.(.+)", r"down.\1.norm.\2"),
            (r"classifier\.norm\.(.+)", r"head.norm.\1"),
            (r"classifier\.head\.(.+)", r"head.fc.\1"),
        ],
    )
    moved: StateDict = {}
    for key, value in named.items():
        if key.startswith("down."):
            _, stage, rest = key.split(".", 2)
            key = f"stages.{int(stage) + 1}.downsample.{rest}"
        # the linear layers may be 1x1 convolutions
        moved[key] = value.flatten(1) if ".channel_mixer." in key and value.ndim == 4 else value
    return convert_mixers(moved, mixer_by_stage(config))


register_family(
    "official VMamba",
    "pyramid",
    has_keys(r"layers\.\d+\.blocks\.\d+\.op\.A_logs", r"classifier\.head\."),
    convert_vmamba,
)

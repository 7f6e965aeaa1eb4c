"""The language of all converters: rules that rename, parts that are joined, mixers that convert what is their own.

A converter renames a source's keys by rules, then lets each mixer convert what is its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...mixers.registry import mixer_class
from ...schema import split_spec
from ..backbones.layers import per_stage
from .layouts import Layout, StateDict, register_layout

# patterns for whole keys, and what stands in their place: a text with groups, or a function of the match
Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]

PATCHES = [(r"(?:stem|patch_embed)\.proj\.(.+)", r"stem.conv.\1"), (r"patch_embed\.norm\.(.+)", r"stem.norm.\1")]
POSITIONS = [("cls_token", "class_token"), ("pos_embed", "position")]
HEAD = [(r"norm\.(.+)", r"head.norm.\1"), (r"(?:head|classifier)\.(weight|bias)", r"head.fc.\1")]


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> StateDict:
    """Every key by the first rule whose pattern fits; others stay."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    out: StateDict = {}
    for key, value in tensors.items():
        match, replacement = next(((m, r) for p, r in compiled if (m := p.fullmatch(key)) is not None), (None, ""))
        if match is not None:
            key = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
        out[key] = value
    return out


def next_stage(match: re.Match[str]) -> str:
    """For a downsampling that its source has at the end of a stage: groups 1 the stage, 2 what follows."""
    return f"stages.{int(match[1]) + 1}.downsample.{match[2]}"


def join(tensors: Mapping[str, Tensor], pattern: str, target: str, order: Sequence[str]) -> StateDict:
    """Put entries that are parts of one matrix together, along the first axis.

    Args:
        tensors: all entries; those that do not fit stay.
        pattern: of whole keys; its group `part` says which part it is.
        target: the joined key, with the pattern's groups.
        order: the parts, the first one first.
    """
    out: StateDict = {}
    parts: dict[str, StateDict] = {}
    for key, value in tensors.items():
        if found := re.fullmatch(pattern, key):
            parts.setdefault(found.expand(target), {})[found["part"]] = value
        else:
            out[key] = value
    return out | {key: torch.cat([these[name] for name in order]) for key, these in parts.items()}


def linear(tensors: Mapping[str, Tensor]) -> StateDict:
    """Convolutions of 1x1 in blocks, outside of the mixers, as linear layers."""
    part = re.compile(r"stages\.\d+\.blocks\.\d+\.(?!mixer\.).*weight")
    return {k: v.flatten(1) if v.ndim == 4 and part.fullmatch(k) else v for k, v in tensors.items()}


def convert_mixers(tensors: Mapping[str, Tensor], mixer_of: Callable[[int], str]) -> StateDict:
    """Entries `stages.i.blocks.j.mixer.*`, or `blocks.i.mixer.*`, by `convert_official` of the mixers.

    Args:
        tensors: all entries; others stay.
        mixer_of: the name of the mixer in stage or block i.
    """
    out: StateDict = {}
    parts: dict[tuple[int, str], StateDict] = {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"((?:stages|blocks)\.(\d+)\.(?:blocks\.\d+\.)?mixer\.)(.+)", key):
            parts.setdefault((int(found[2]), found[1]), {})[found[3]] = value
        else:
            out[key] = value
    for (place, prefix), part in parts.items():
        converted = mixer_class(mixer_of(place)).convert_official(part)
        out.update({prefix + name: value for name, value in converted.items()})
    return out


def mixer_by_block(config: Mapping[str, Any]) -> Callable[[int], str]:
    """The mixer of an isotropic model, by block."""
    pattern = config["mixer"] if isinstance(config["mixer"], (list, tuple)) else [config["mixer"]]
    names = [split_spec(m, key="model.mixer", kind="mixer")[0] for m in pattern]
    return lambda stage: names[stage % len(names)]


def mixer_by_stage(config: Mapping[str, Any]) -> Callable[[int], str]:
    """The mixer of a pyramid, by stage; the last one for stages that it lacks."""
    mixers = per_stage(config["mixer"], len(config["depths"]), key="model.mixer")
    return lambda stage: split_spec(mixers[min(stage, len(mixers) - 1)], key="model.mixer", kind="mixer")[0]


def has_keys(*patterns: str) -> Callable[[set[str]], bool]:
    """Whether every pattern fits the start of some key."""
    compiled = [re.compile(p) for p in patterns]
    return lambda keys: all(any(p.match(k) for k in keys) for p in compiled)


def register_family(
    name: str,
    backbone: str,
    has: Callable[[set[str]], bool],
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Any]], StateDict],
    **more: Any,
) -> None:
    """Make a converter known for models of a backbone, told from the keys; `more` are other fields of `Layout`."""
    register_layout(
        Layout(name, lambda keys, config: config.get("backbone") == backbone and has(keys), convert, **more),
    )

"""What the converters of several families share.

A converter renames a source's keys by rules, then lets each mixer convert what is its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ...mixers.registry import mixer_class
from ...schema import split_spec
from ..backbones.layers import per_stage
from .layouts import Layout, StateDict, register_layout

Rules = Iterable[tuple[str, str]]

PATCHES = [(r"(?:stem|patch_embed)\.proj\.(.+)", r"stem.conv.\1"), (r"patch_embed\.norm\.(.+)", r"stem.norm.\1")]
HEAD = [(r"norm\.(.+)", r"head.norm.\1"), (r"(?:head|classifier)\.(weight|bias)", r"head.fc.\1")]


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> StateDict:
    """Every key by the first rule, a pattern for the whole key and its replacement, that fits; others stay."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    out: StateDict = {}
    for key, value in tensors.items():
        found = ((m, r) for p, r in compiled if (m := p.fullmatch(key)) is not None)
        match = next(found, None)
        out[key if match is None else match[0].expand(match[1])] = value
    return out


def convert_mixers(tensors: Mapping[str, Tensor], mixer_of: Callable[[int], str]) -> StateDict:
    """Entries `stages.i.blocks.j.mixer.*` by `convert_official` of the mixers, which `mixer_of(i)` names by stage."""
    out: StateDict = {}
    parts: dict[tuple[int, str], StateDict] = {}
    for key, value in tensors.items():
        if found := re.fullmatch(r"(stages\.(\d+)\.blocks\.\d+\.mixer\.)(.+)", key):
            parts.setdefault((int(found[2]), found[1]), {})[found[3]] = value
        else:
            out[key] = value
    for (stage, prefix), part in parts.items():
        converted = mixer_class(mixer_of(stage)).convert_official(part)
        out.update({prefix + name: value for name, value in converted.items()})
    return out


def mixer_by_block(config: Mapping[str, Any]) -> Callable[[int], str]:
    """The mixer of an isotropic model, by block."""
    pattern = config["mixer"] if isinstance(config["mixer"], (list, tuple)) else [config["mixer"]]
    names = [split_spec(m, key="model.mixer", kind="mixer")[0] for m in pattern]
    return lambda stage: names[stage % len(names)]


def mixer_by_stage(config: Mapping[str, Any]) -> Callable[[int], str]:
    """The mixer of a pyramid, by stage."""
    mixers = per_stage(config["mixer"], len(config["depths"]), key="model.mixer")
    return lambda stage: split_spec(mixers[stage], key="model.mixer", kind="mixer")[0]


def has_keys(*patterns: str) -> Callable[[set[str]], bool]:
    """Whether every pattern fits the start of some key."""
    compiled = [re.compile(p) for p in patterns]
    return lambda keys: all(any(p.match(k) for k in keys) for p in compiled)


def register_family(
    name: str,
    backbone: str,
    has: Callable[[set[str]], bool],
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Any]], StateDict],
) -> None:
    """Make a converter known for models of a backbone, told from the keys."""
    register_layout(
        Layout(name, lambda keys, config: config.get("backbone") == backbone and has(keys), convert),
    )

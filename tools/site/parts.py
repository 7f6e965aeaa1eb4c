"""The pages of token mixers and of channel mixers."""

from __future__ import annotations

import inspect
import math
import textwrap
from typing import Any

import torch

from ...mixers.base import Mixer
from ...mixers.registry import mixer_class, mixer_options
from ...models.parts.channel_mixers import CHANNEL_MIXERS
from ...schema import keyword_options
from ...training.cost import count_parameters, measure_activation_bytes, measure_flops
from ..markdown import options_table, table
from ..mixer_table import place
from ..model_table import families
from ..papers import linked, summary, year
from .growth import DIM as COST_DIM
from .growth import costs
from .mixing import DIM, PLANE, picture_of_channel_mixer, picture_of_mixer
from .standings import of_mixer
from .standings_table import standings_section

_AXES = {1: "sequences `(B, N, C)`", 2: "images `(B, H, W, C)`", 3: "clips `(B, T, H, W, C)`"}
_CAUSAL = {
    "can": "yes, with `causal=True`, and without it tokens see all others",
    "always": "always: a token sees those before it",
    "cannot": "no",
}
# Paragraphs of a docstring that have a place of their own on the page.
_SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Shapes:")


def notes(part: type) -> str:
    """What a docstring says below its first paragraph and outside of its lists of arguments."""
    found = []
    for paragraph in inspect.cleandoc(part.__doc__ or "").split("\n\n")[1:]:
        if paragraph.startswith(_SECTIONS):
            continue
        formula = paragraph.startswith("    ")
        found.append(f"```text\n{textwrap.dedent(paragraph).rstrip()}\n```" if formula else paragraph.strip())
    return linked("\n\n".join(found))


def _head(name: str, part: type, source: str, equation: str) -> list[str]:
    facts = table(("Paper", linked(source)), [("Year", year(source)), ("Code", place(part))])
    parts = [f"# {name}", summary(part.__doc__), facts]
    return [*parts, f"```text\n{equation}\n```"] if equation else parts


def _bytes(number: int | None) -> str:
    if number is None:
        return "-"
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def _flops(number: int) -> str:
    return f"{number / 1e9:.3g} G" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _abilities(cls: type[Mixer]) -> str:
    takes = ", ".join(_AXES[axes] for axes in cls.axes)
    rows = [
        ("Causal", _CAUSAL[cls.causal]),
        ("Decodes token by token", _yes(cls.streams)),
        ("Honours padding masks", _yes(cls.masks)),
        ("Keeps packed documents apart", _yes(cls.packs)),
        ("Made for one grid", "yes; `resize_grid` changes it" if cls.needs_grid else "no"),
        ("Time, memory of training", f"{cls.complexity}, {cls.memory} in the number of tokens N"),
    ]
    return table(("Takes", takes), rows)


def _growth(name: str, *, quick: bool) -> str:
    found = costs(name)[: 2 if quick else None]
    rows = [
        ("x".join(map(str, c.grid)), f"{c.parameters:,}", _flops(c.flops), _bytes(c.kept), _bytes(c.state))
        for c in found
    ]
    text = (
        "One sample of 64 channels, default options, counted and not timed. *Kept* is what training keeps for the "
        "backward pass; *state* is what decoding keeps after all tokens."
    )
    return f"{text}\n\n" + table(("Tokens", "Parameters", "FLOPs", "Kept", "State"), rows)


def _usage(name: str, cls: type[Mixer]) -> str:
    grid = {1: "128,", 2: "14, 14", 3: "4, 14, 14"}[2 if 2 in cls.axes else cls.axes[0]]
    option = (
        f", grid=({grid})" if cls.needs_grid else ", causal=True" if cls.causal == "can" and 2 not in cls.axes else ""
    )
    return (
        "```python\nimport torch\nfrom mixerzoo import create_mixer\n\n"
        f'mixer = create_mixer("{name}", 64{option})\ny = mixer(torch.randn(2, {grid.strip(",")}, 64))\n```'
    )


def mixer_page(name: str, *, quick: bool = False) -> tuple[str, bytes]:
    """The page of a token mixer, and its picture.

    Args:
        name: of the mixer.
        quick: without a training for the picture, and costs of short sequences only.
    """
    cls = mixer_class(name)
    picture, caption = picture_of_mixer(name, train=not quick)
    users = [f"[`{family.name}`](../models/{family.name}.md)" for family in families() if name in family.mixers]
    options = mixer_options(name)
    parts = _head(name, cls, cls.source, cls.equation)
    parts += ["## Use it", _usage(name, cls), f"On the command line: `python train.py mixer={name}`."]
    if users:
        parts.append(
            f"Models with it: {', '.join(users)}. In any other it takes the place of the mixer by `mixer={name}`."
        )
    parts += ["## What it mixes", f"![Strength of the dependence of outputs on inputs]({name}.png)", caption]
    parts += ["## What it can do", _abilities(cls)]
    parts += ["## Options", options_table(options, [cls]) if options else "It has none of its own."]
    if 1 in cls.axes:
        parts.append("As every mixer of sequences it also has the options of [token orders](../orders.md).")
    parts += ["## Cost over the number of tokens", _growth(name, quick=quick)]
    parts += ["## In the stored comparisons", standings_section(of_mixer(name))]
    if notes(cls):
        parts += ["## Notes", notes(cls)]
    return "\n\n".join(parts) + "\n", picture


def channel_mixer_names() -> list[str]:
    """All channel mixers."""
    return sorted(CHANNEL_MIXERS.entries)


def channel_mixer_page(name: str) -> tuple[str, bytes]:
    """The page of a channel mixer, and its picture."""
    part: Any = CHANNEL_MIXERS.entries[name]
    options = keyword_options(part, CHANNEL_MIXERS.reserved)
    torch.manual_seed(0)
    grid = PLANE if 2 in part.axes else (4, *PLANE)
    small, built = (CHANNEL_MIXERS.build(name, dim, key="channel_mixer").eval() for dim in (DIM, COST_DIM))
    picture, caption = picture_of_channel_mixer(small, grid, mixes_tokens=part.mixes_tokens)
    tokens = torch.randn(1, *grid, COST_DIM)
    count = math.prod(grid)
    rows = [
        ("Mixes tokens, too", _yes(part.mixes_tokens)),
        ("Depends on other samples in training", _yes(part.mixes_batch)),
        (f"Parameters, at {COST_DIM} channels", f"{count_parameters(built):,}"),
        ("FLOPs of a token", f"{measure_flops(built, tokens) / count:,.0f}"),
        ("Kept for the backward pass, of a token", _bytes(measure_activation_bytes(built, tokens) // count)),
    ]
    parts = _head(name, part, part.source, part.equation)
    parts.append(f"In a configuration: `channel_mixer: {name}`. On the command line: `model.channel_mixer={name}`.")
    parts += ["## What it mixes", f"![Strength of the dependence of outputs on inputs]({name}.png)", caption]
    takes = ", ".join(_AXES[axes] for axes in part.axes)
    parts += ["## What it can do, and what it costs", table(("Takes", takes), rows)]
    parts += ["## Options", options_table(options, [part]) if options else "It has none."]
    parts += ["## Notes", notes(part)] if notes(part) else []
    return "\n\n".join(parts) + "\n", picture

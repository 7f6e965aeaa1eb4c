"""How other sources name and lay out their weights: one `Layout` each, found by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...plugins import discover

StateDict = dict[str, Tensor]
Facts = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Layout:
    """How another source names and lays out a family's weights.

    Attributes:
        name: of the source, for messages, e.g. "timm metaformer".
        matches: whether these keys are in this layout, for a model of this configuration.
        convert: their tensors to ours; gets the model's configuration.
        changes: entries of the configuration (dotted paths) in which the source's computation differs from our default.
        facts: what the source's `config.json` says and what a model of ours has instead, by the name of our option, as
            pairs. What the weights alone do not show belongs here; None on either side says nothing.
    """

    name: str
    matches: Callable[[set[str], Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Tensor], Mapping[str, Any]], StateDict]
    changes: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    facts: Callable[[Mapping[str, Any], nn.Module], Facts] = lambda source, model: {}


LAYOUTS: list[Layout] = []


def register_layout(layout: Layout) -> None:
    """Make a source's layout known to `create_model(..., checkpoint=FILE)`."""
    LAYOUTS.append(layout)


def layouts() -> list[Layout]:
    """All layouts, after importing every module of this folder."""
    discover(__name__.rpartition(".")[0])
    return LAYOUTS

"""What a configuration says of each stage or layer, and the block that is built from it.

Axis letters: C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ...errors import OptionError
from ...mixers import Grid, create_mixer
from ...mixers.registry import check_mixer
from ..parts.blocks import BLOCKS
from ..parts.channel_mixers import CHANNEL_MIXERS
from ..parts.norms import NORMS
from .fit import check_fit

# What a config may give a block to fill in.
_AROUND = ("norm", "channel_mixer", "layer_scale", "res_scale")
# What must fit the grid and, in a causal model, not show the future.
_CHECKED = {"norm": NORMS, "channel_mixer": CHANNEL_MIXERS, "block": BLOCKS}


def per_stage(value: Any, stages: int, *, key: str) -> list[Any]:
    """One value for all stages, or a list with a value for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * stages
    if len(value) != stages:
        raise OptionError(key, f"{len(value)} entries for {stages} stages.")
    return list(value)


class StageSpec(NamedTuple):
    """What a config says of one stage or layer.

    values: by the name of the config's entry, e.g. "mixer".
    paths: where each is written, e.g. `mixer[1]`.
    """

    values: dict[str, Any]
    paths: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


def stage_specs(config: Any, count: int, names: Sequence[str], *, repeated: Sequence[str] = ()) -> list[StageSpec]:
    """The entries `names` of a config for each of `count` stages or layers.

    An entry is one value for all, or a list with one for each. Those in `repeated` may be shorter lists, patterns that
    are repeated to the count.

    Raises:
        OptionError: a list of another length, or an empty pattern.
    """
    specs = [StageSpec({}, {}) for _ in range(count)]
    for name in names:
        value = getattr(config, name)
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        if name in repeated:
            if not entries:
                raise OptionError(name, "the pattern is empty.")
        else:
            entries = per_stage(value, count, key=name)
        for i, spec in enumerate(specs):
            at = i % len(entries)
            spec.values[name] = entries[at]
            spec.paths[name] = f"{name}[{at}]" if isinstance(value, (list, tuple)) and len(value) > 1 else name
    return specs


class Place(NamedTuple):
    """Where a block stands.

    grid: of the tokens there, None where it is not known; it fixes the grid of mixers that need one.
    rank: of that grid.
    what: the tokens in words, for messages.
    layer, layers: which block of the model it is, and of how many.
    causal: build the mixer's causal form.
    """

    grid: Grid | None
    rank: int
    what: str
    layer: int
    layers: int
    causal: bool = False


def build_block(
    spec: StageSpec,
    dim: int,
    place: Place,
    *,
    drop_path: float,
    defaults: dict[str, Any],
    block: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """The token mixer of a layer and the block around it.

    Args:
        spec: with `mixer` and, where the config has them, `block`, `norm`, `channel_mixer`, `layer_scale`, `res_scale`.
        dim: channels C.
        place: where the block stands.
        drop_path: of this block.
        defaults: the config's entries where nobody says anything: a block that cannot take another value refuses it.
        block: in place of the one that the config names.

    Raises:
        OptionError: with the path from the model on.
    """
    path = spec.paths["mixer"]
    name, options = check_mixer(spec.mixer, key=path)
    mixer = create_mixer(
        name, dim, grid=place.grid, causal=place.causal, layer_index=place.layer, num_layers=place.layers, key=path,
        **options,
    )  # fmt: skip
    if place.rank not in mixer.axes:
        raise OptionError(path, f'the mixer "{name}" takes {mixer.axes} grid axes, not {place.what}.')
    for option, parts in _CHECKED.items():
        value = spec.values.get(option)
        check_fit(
            parts, value, key=spec.paths.get(option, option), rank=place.rank, what=place.what, causal=place.causal
        )
    around = {option: spec.values[option] for option in _AROUND if option in spec.values}
    around |= {"mixer": mixer, "drop_path": drop_path}
    try:
        if block is not None:
            return block(dim, **around)
        return BLOCKS.build(spec.block, dim, key="block", defaults=defaults, **around)
    except OptionError as error:
        error.rename(spec.paths)
        raise

"""Finding and building mixers by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import OptionError, under, unknown
from ..plugins import discover as discover_parts
from ..schema import Count, Size, check_options, keyword_options, split_spec, takes
from .base import MIXERS, Grid, Mixer
from .memory import fits_memory
from .orders.ordered import Ordered
from .orders.orders import check_order

# Filled in by `create_mixer` and the backbones, so not part of the options that a user sets.
RESERVED = ("grid", "causal", "layer_index", "num_layers")
_CAPABILITIES = ("axes", "causal", "needs_grid", "masks", "packs", "streams", "complexity")

# Options that mixers had in files of earlier versions; at these values they changed nothing.
_FORMER = {"backend": "auto"}

# Options that every mixer of sequences has, of `Ordered`.
ORDER_OPTIONS = keyword_options(Ordered, (*RESERVED, "can_be_causal"))


def discover() -> dict[str, type[Mixer]]:
    """All mixers, after importing every module of this folder."""
    discover_parts(__name__.rpartition(".")[0])
    return MIXERS


def mixer_class(name: str, *, key: str = "mixer") -> type[Mixer]:
    """The class registered under `name`.

    Raises:
        ConfigError: no such mixer; the message holds `key` and the nearest name.
    """
    found = discover().get(name) if isinstance(name, str) else None
    if found is None:
        raise unknown(key, name, MIXERS)
    return found


def list_mixers(**capabilities: Any) -> list[str]:
    """Names of all mixers that have the given class data.

    Example: `list_mixers(causal=True, streams=True)`, `list_mixers(axes=2)`. `causal=True` means that the mixer can be
    causal ("can" or "always"), `causal=False` that it can be used without ("can" or "cannot"), a string is compared as
    it is; `axes=2` that grids of rank 2 are accepted.

    Raises:
        ConfigError: unknown capability.
    """
    for key in capabilities:
        if key not in _CAPABILITIES:
            raise unknown("list_mixers", key, _CAPABILITIES)

    def fits(cls: type[Mixer]) -> bool:
        for key, wanted in capabilities.items():
            has = getattr(cls, key)
            if key == "axes":
                ok = set([wanted] if isinstance(wanted, int) else wanted) <= set(has)
            elif key == "causal" and isinstance(wanted, bool):
                ok = has != ("cannot" if wanted else "always")
            else:
                ok = has == wanted
            if not ok:
                return False
        return True

    return sorted(name for name, cls in discover().items() if fits(cls))


def mixer_options(name: str, *, key: str = "mixer") -> dict[str, inspect.Parameter]:
    """The options of a mixer, from its constructor: name -> `inspect.Parameter` with default and resolved type hint.

    Every mixer that takes sequences also has those of token orders, `ORDER_OPTIONS`, which are not among these.
    """
    return keyword_options(mixer_class(name, key=key), RESERVED)


def _current(name: str, options: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """Options without those of earlier versions; `MIXERZOO_KERNELS` chooses a backend for all ops."""
    own = mixer_options(name, key=key)
    return {k: v for k, v in options.items() if k in own or k not in _FORMER or v != _FORMER[k]}


def check_mixer_options(name: str, options: Mapping[str, Any], *, key: str = "mixer") -> None:
    """Hold options against the constructor's signature.

    Raises:
        ConfigError: an unknown option or a value of the wrong type; the message starts with `key` and the option.
    """
    takes_order = 1 in mixer_class(name, key=key).axes
    with under(key):
        if not takes_order and options.get("order") is not None:
            raise OptionError(
                "order", f'the mixer "{name}" takes {mixer_class(name).axes} grid axes, not the sequences of an order.'
            )
        allowed = {**mixer_options(name), **(ORDER_OPTIONS if takes_order else {})}
        check_options(options, allowed, owner=f'mixer "{name}"')
        if options.get("order") is not None:
            check_order(options["order"], key="order")
        elif takes_order:
            for option in ("merge", "causal_paths", "separate_paths"):
                if options.get(option, ORDER_OPTIONS[option].default) != ORDER_OPTIONS[option].default:
                    raise OptionError(option, "it has no effect without `order`.")


def create_mixer(
    name: str,
    dim: int,
    *,
    grid: Grid | None = None,
    causal: bool = False,
    layer_index: Count = 0,
    num_layers: Size = 1,
    key: str = "mixer",
    **options: Any,
) -> Mixer:
    """Build a token mixer.

    Args:
        name: a name from `list_mixers()`.
        dim: number of channels C.
        grid: size of the token grid, needed only by mixers with `needs_grid`.
        causal: build the causal form; output t then depends on tokens up to t in raster order.
        layer_index: position in the model, for the few mixers whose constants depend on it.
        num_layers: how many positions the model has.
        key: path of the configuration key, for error messages.
        options: keyword-only arguments of the mixer's constructor; see `mixer_options(name)`. For a mixer of sequences
            also `order`, `merge`, `causal_paths` and `separate_paths`: the token order in which it reads a grid; see
            `ordered.Ordered`.

    Returns:
        A module that maps `(B, *grid, C)` to the same shape.

    Raises:
        ConfigError: unknown mixer or option, a value of the wrong type or out of range, missing grid, or a mixer that
            cannot be causal.
    """
    cls = mixer_class(name, key=key)
    options = _current(name, options, key=key)
    check_mixer_options(name, options, key=key)
    with under(key), fits_memory():
        given = {"dim": dim, "grid": grid, "causal": causal, "layer_index": layer_index, "num_layers": num_layers}
        check_options(given, _FILLED_IN, owner=f'mixer "{name}"')
        grid = None if grid is None else tuple(grid)
        ordering = {option: options.pop(option) for option in ORDER_OPTIONS if 1 in cls.axes and option in options}

        def plain(grid: Grid | None, causal: bool) -> Mixer:
            return _create(cls, dim, grid, causal, layer_index, num_layers, options)

        if ordering.get("order") is None or (causal and ordering["order"] == "raster"):  # causal mixers read so anyway
            return plain(grid, causal)
        if causal:
            raise OptionError(
                "order", f"a causal model reads its tokens from first to last; {ordering['order']!r} does not."
            )
        return Ordered(dim, plain, **ordering, grid=grid, layer_index=layer_index, can_be_causal=cls.causal)


_FILLED_IN = keyword_options(create_mixer)
_FILLED_IN["dim"] = inspect.Parameter("dim", inspect.Parameter.KEYWORD_ONLY, annotation=Size)


def _create(
    cls: type[Mixer],
    dim: int,
    grid: Grid | None,
    causal: bool,
    layer_index: int,
    num_layers: int,
    options: dict[str, Any],
) -> Mixer:
    """A mixer from checked options, without a token order."""
    name = cls.name
    if cls.needs_grid:
        if grid is None:
            raise OptionError("", f'the mixer "{name}" has parameters that depend on the grid; pass grid=(H, W).')
        if len(grid) not in cls.axes:
            raise OptionError("", f'the mixer "{name}" takes {cls.axes} grid axes, not {len(grid)}: grid={grid}.')
    if causal and cls.causal == "cannot":
        raise OptionError(
            "", f'the mixer "{name}" cannot be causal. Causal mixers: {", ".join(list_mixers(causal=True))}.'
        )
    filled_in = {"grid": grid, "causal": causal, "layer_index": layer_index, "num_layers": num_layers}
    if grid is None:
        del filled_in["grid"]
    return cls(dim, **options, **{k: v for k, v in filled_in.items() if takes(cls, k)})


def check_mixer(spec: str | Mapping[str, Any], *, key: str = "mixer") -> tuple[str, dict[str, Any]]:
    """A mixer as written in a config, a name or a mapping with `name` and options, checked: (name, options)."""
    name, options = split_spec(spec, key=key, kind="mixer")
    options = _current(name, options, key=key)
    check_mixer_options(name, options, key=key)
    return name, options

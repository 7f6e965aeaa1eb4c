"""What every token mixer promises: shapes, class data, options, causality, grids, and being compiled.

Padding and packed documents are in `padding.py`, streaming in `streaming.py`.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..mixers import Mixer, create_mixer, list_mixers, mixer_class, mixer_options
from ..schema import takes
from ..training.cost import measure_flops
from .base import at_the_smallest, kind_of_part, promise, promises, require
from .tools import ROUNDED, Grid, near, other_values, refused, shaken, tokens

KIND = "mixer"
DIM = 32
# the smallest first; not square, as many mistakes show only there
GRIDS: dict[int, tuple[Grid, ...]] = {
    1: ((3,), (5,), (12,)),
    2: ((2, 3), (6, 5)),
    3: ((2, 2, 3), (2, 4, 3)),
}

kind_of_part(KIND, list_mixers)


def all_grids(name: str) -> Iterator[tuple[Grid, ...]]:
    """Grids of every rank that the mixer takes."""
    return (GRIDS[rank] for rank in mixer_class(name).axes)


def last_grid(name: str) -> Grid:
    """The largest grid of the highest rank."""
    return GRIDS[mixer_class(name).axes[-1]][-1]


def build(name: str, grid: Grid, *, causal: bool = False, dim: int = DIM, seed: int = 0, **options: Any) -> Mixer:
    """The mixer on a grid, in evaluation mode; one that is always causal is."""
    torch.manual_seed(seed)
    causal = causal or mixer_class(name).causal == "always"
    return create_mixer(name, dim, grid=grid, causal=causal, **options).eval()


def trained_alone(name: str) -> tuple[str, ...]:
    """Beginnings of the names of the parameters that auxiliary losses alone train."""
    return tuple(start for starts in mixer_class(name).aux_losses.values() for start in starts)


def can_be_causal(name: str) -> bool:
    return mixer_class(name).causal != "cannot"


Options = Mapping[str, Any]


def variants(name: str, *, causal: bool, given: Options | None = None) -> Iterator[dict[str, Any]]:
    """Options to try a mixer with: none, and each alternative of the class for itself; or those given alone.

    In the causal form those that it refuses are left out; without options it must exist.
    """
    if given is not None:
        yield dict(given)
        return
    cls = mixer_class(name)
    options = other_values(mixer_options(name), cls.alternatives, cls.inert)
    tried: list[dict[str, Any]] = [{}]
    for option, (_, value) in options.items():
        tried.append({**cls.requires.get(option, {}), option: value})
    for given in tried:
        given.pop("causal", None)
        if given and causal:
            try:
                build(name, (12,), causal=True, **given)
            except ConfigError:
                continue
        yield given


def check_options(name: str, given: Options) -> None:
    """Hold a mixer with options taken together to what it promises with any: causal, streaming, padded and packed.

    Raises:
        BrokenPromise: where it does not keep it.
    """
    for one in promises(KIND, name):
        if one.takes_options:
            one.check(name, given=given)


@promise(KIND, about="")
def class_data_are_stated(name: str) -> None:
    """The class says what it is, where it comes from and what it can do, and its signatures agree."""
    cls = mixer_class(name)
    require(cls.causal in ("can", "cannot", "always"), "`causal` is unknown.", causal=cls.causal)
    require(set(cls.axes) <= {1, 2, 3} and cls.axes, "`axes` are ranks of grids.", axes=cls.axes)
    require(cls.source, "`source` is empty: where does the mixer come from?")
    require(cls.__doc__, "The class has no docstring.")
    require(takes(cls, "causal") == (cls.causal == "can"), "The option `causal` is there exactly if the mixer can be.")
    reads = inspect.signature(cls.forward).parameters
    for argument, stated in (
        ("document_ids", cls.packs),
        ("embeddings", cls.reads_embeddings),
        ("token_ids", cls.reads_ids),
        ("token_attention", cls.gives_attention),
    ):
        require((argument in reads) == stated, f"`forward` takes `{argument}` exactly if the class data say so.")
    own = [key for key, value in vars(cls).items() if key[:1] != "_" and not callable(value)]
    known = typing.get_type_hints(Mixer)
    for key in own:
        near_one = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        taken_for_another = key not in known and near_one and not hasattr(Mixer, key)
        require(not taken_for_another, f"`{key}` is no class data; did you mean `{(near_one or [key])[0]}`?")
    unknown = set(cls.alternatives) - set(mixer_options(name))
    require(not unknown, "`alternatives` names options that do not exist.", options=sorted(unknown))
    mixer = build(name, last_grid(name))
    names = {n for n, _ in mixer.named_parameters()}
    undecayed = mixer.no_weight_decay()
    require(undecayed <= names, "`no_weight_decay` names no parameter.", names=sorted(undecayed - names))
    vectors = {n for n, p in mixer.named_parameters() if p.ndim <= 1}
    require(vectors <= undecayed, "Vectors take no weight decay.", names=sorted(vectors - undecayed))
    if cls.needs_grid:
        causal = cls.causal == "always"
        require(refused(lambda: create_mixer(name, DIM, causal=causal), "grid"), "A missing grid is not refused.")


@promise(KIND, basic=3)
def shape_and_dtype_are_kept(name: str) -> None:
    """`(B, *grid, C)` comes out as it went in, in float32 and bfloat16, on every rank of grid."""
    for grids, dtype in itertools.product(all_grids(name), (torch.float32, torch.bfloat16)):

        def check(grid: Grid, dtype: torch.dtype = dtype) -> None:
            x = tokens(2, *grid, DIM).to(dtype)
            y = build(name, grid).to(dtype)(x)
            require(y.shape == x.shape, "The shape is changed.", shape=tuple(x.shape), got=tuple(y.shape))
            require(y.dtype == dtype, "The dtype is changed.", dtype=dtype, got=y.dtype)
            require(y.isfinite().all(), "The output is not finite.", shape=tuple(x.shape), dtype=dtype)

        at_the_smallest(check, grids)


@promise(KIND, basic=6)
def gradients_reach_everything(name: str) -> None:
    """The input and every trained parameter get a finite gradient, in float32 and bfloat16."""
    for grids, dtype in itertools.product(all_grids(name), (torch.float32, torch.bfloat16)):

        def check(grid: Grid, dtype: torch.dtype = dtype) -> None:
            mixer = build(name, grid).to(dtype)
            x = tokens(2, *grid, DIM).to(dtype).requires_grad_()
            mixer(x).float().square().sum().backward()
            require(x.grad is not None and x.grad.isfinite().all(), "No finite gradient of the input.", grid=grid)
            untrained = trained_alone(name)
            for key, parameter in mixer.named_parameters():
                if parameter.requires_grad and not key.startswith(untrained):
                    require(parameter.grad is not None, "A parameter has no gradient.", parameter=key, grid=grid)
                    assert parameter.grad is not None
                    require(parameter.grad.isfinite().all(), "A gradient is not finite.", parameter=key, grid=grid)

        check(grids[-1])


@promise(KIND)
def another_width_works(name: str) -> None:
    """48 channels and a single sample work too."""
    grid = last_grid(name)
    require(build(name, grid, dim=48)(tokens(1, *grid, 48)).isfinite().all(), "Not finite.", dim=48, grid=grid)


@promise(KIND)
def autocast_stays_finite(name: str) -> None:
    """Under bfloat16 autocast the output is finite, and off by no more than a dozen roundings of all that it reads."""
    limit = 12 * torch.finfo(torch.bfloat16).eps
    for grids in all_grids(name):
        mixer, x = shaken(build(name, grids[-1])), tokens(2, *grids[-1], DIM)
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x)
        full = mixer(x)
        require(y.isfinite().all(), "Not finite.", grid=grids[-1])
        off = float((y.float() - full).detach().norm() / full.detach().norm().clamp_min(1e-30))
        require(off <= limit, "Far from the full precision.", grid=grids[-1], relative=off)


@promise(KIND, applies=lambda name: not can_be_causal(name), about="__init__")
def a_causal_form_is_refused(name: str) -> None:
    """A mixer that cannot be causal says so."""
    grid = GRIDS[mixer_class(name).axes[0]][-1]
    require(refused(lambda: create_mixer(name, DIM, grid=grid, causal=True), "cannot be causal"), "It is not refused.")


@promise(KIND, applies=can_be_causal)
def the_future_is_not_seen(name: str, given: Options | None = None) -> None:
    """No gradient comes from later tokens, changed later tokens change nothing, and the past is seen."""
    for options in variants(name, causal=True, given=given):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            length = grid[0]
            mixer = shaken(build(name, grid, causal=True, **options))
            x, at = tokens(2, length, DIM).requires_grad_(), length // 2
            (grad,) = torch.autograd.grad(mixer(x)[:, at].square().sum(), x)
            seen = float(grad[:, at + 1 :].abs().max()) if at + 1 < length else 0.0
            require(
                seen <= ROUNDED * float(grad.abs().max()), "The future is seen.", length=length, at=at, options=options
            )
            past = float(grad[:, :at].abs().max())
            mixes = name != "identity" and options.get("variant") != "none"
            if mixes and length == 12 and (not options or given is not None):
                require(past > 0, "The past is not seen.", length=length, at=at)
            with torch.no_grad():  # a choice has no gradient: what it reads shows only in values
                later = torch.cat([x[:, : at + 1], 3 * tokens(2, length - at - 1, DIM, seed=4)], 1)
                near(
                    mixer(later)[:, : at + 1], mixer(x)[:, : at + 1], "Changed later tokens change earlier outputs.",
                    length=length, at=at, options=options,
                )  # fmt: skip

        at_the_smallest(check, GRIDS[1])


@promise(KIND, basic=5)
def the_same_weights_give_the_same_numbers(name: str) -> None:
    """Two calls agree exactly, and so does a mixer with other initial values after `load_state_dict`."""
    grid = last_grid(name)
    first, x = shaken(build(name, grid)), tokens(2, *grid, DIM)
    second = build(name, grid, seed=7)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        require(torch.equal(first(x), first(x)), "Two calls differ.", grid=grid)
        require(torch.equal(first(x), second(x)), "The state dict does not hold everything.", grid=grid)


@promise(KIND)
def another_grid_works(name: str) -> None:
    """A larger grid works, after `resize_grid` where parameters depend on it; without it such a mixer refuses."""
    for grids in all_grids(name):
        mixer = shaken(build(name, grids[-1]))
        grid = tuple(s + 2 for s in grids[-1])
        x = tokens(2, *grid, DIM)
        if mixer.needs_grid:
            if not mixer.is_causal:
                require(refused(lambda: mixer(x), "resize_grid"), "Another grid is not refused.", grid=grid)  # noqa: B023
            mixer.resize_grid(grid)
        y = mixer(x)
        require(y.shape == x.shape and y.isfinite().all(), "Another grid gives nothing usable.", grid=grid)


@promise(KIND)
def it_compiles_without_graph_breaks(name: str) -> None:
    """`torch.compile(fullgraph=True)` gives the same outputs and gradients."""
    grid = last_grid(name)
    mixer, x = shaken(build(name, grid)), tokens(2, *grid, DIM).requires_grad_()
    torch._dynamo.reset()
    y, expected = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x)
    near(y, expected, "The compiled output differs.", grid=grid)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    near(grad, expected_grad, "The compiled gradient differs.", grid=grid, tolerance=1e-3)


@promise(KIND, about="__init__")
def every_option_has_an_effect(name: str) -> None:
    """Each option changes the output, the parameters or the cost, unless it is declared inert."""
    cls = mixer_class(name)
    for option, (_, value) in other_values(mixer_options(name), cls.alternatives, cls.inert).items():
        given = dict(cls.requires.get(option, {}))
        causal = bool(given.pop("causal", False))
        grid = GRIDS[1 if causal else cls.axes[-1]][-1]
        x = tokens(2, *grid, DIM)
        seen: list[tuple[Tensor, int, Any]] = []
        for options in (given, {**given, option: value}):
            mixer = shaken(build(name, grid, causal=causal, **options)).train()
            torch.manual_seed(5)
            with torch.no_grad():
                y = mixer(x)
            seen.append((y, sum(p.numel() for p in mixer.parameters()), measure_flops(mixer, x)))
        (y0, count0, cost0), (y1, count1, cost1) = seen
        changed = count0 != count1 or cost0 != cost1 or not torch.equal(y0, y1)
        require(changed, "An option has no effect.", option=option, value=value, beside=given)

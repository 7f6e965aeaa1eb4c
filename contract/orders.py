"""What token orders promise: fixed ones visit every token once on every path, learned ones train and hide padding.

Axis letters: K paths, R sequences, L tokens of the longest, N tokens, C channels.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import ConfigError
from ..mixers import create_mixer
from ..mixers.orders.orders import LEARNED, Order
from ..mixers.orders.paths import PATHS, build_paths
from ..mixers.part import stated
from ..schema import Parts, keyword_options, split_spec
from .base import at_the_smallest, kind_of_part, promise, require
from .tools import Grid, garbled, near, other_values, perturbed, tokens

GRIDS: dict[int, tuple[Grid, ...]] = {
    1: ((1,), (4,), (11,)),
    2: ((1, 2), (4, 4), (5, 7)),
    3: ((2, 1, 2), (2, 4, 4), (3, 4, 5)),
}
DIM = 8

kind_of_part("order", lambda: PATHS.entries)
kind_of_part("learned_order", lambda: LEARNED.entries)


def _options(parts: Parts, name: str) -> dict[str, tuple[dict[str, Any], Any]]:
    """For each option with an effect: what it needs beside it, and another value."""
    part = parts.entries[name]
    options = keyword_options(part, parts.reserved)
    values = other_values(options, stated(part, "alternatives"), stated(part, "inert"))
    return {option: (dict(stated(part, "requires").get(option, {})), value) for option, (_, value) in values.items()}


def variants(parts: Parts, name: str) -> Iterator[dict[str, Any]]:
    """The order as it is, and with each other value of an option."""
    yield {"name": name}
    for option, (beside, value) in _options(parts, name).items():
        yield {"name": name, **beside, option: value}


def _ranks(name: str) -> tuple[int, ...]:
    return stated(PATHS.entries[name], "axes")


def _paths(spec: dict[str, Any], grid: Grid, layer_index: int = 0) -> list[torch.Tensor]:
    name, options = split_spec(spec, kind="order")
    return build_paths(name, options, grid, layer_index)


@promise("order")
def class_data_are_stated(name: str) -> None:
    """The function says what it does, its options have other values, and grids of another rank are refused."""
    require(PATHS.entries[name].__doc__, "There is no docstring.")
    _options(PATHS, name)
    for rank in {1, 2, 3} - set(_ranks(name)):
        try:
            _paths({"name": name}, GRIDS[rank][-1])
        except ConfigError:
            continue
        require(False, "A grid of a rank that is not in `axes` is not refused.", rank=rank)


@promise("order")
def every_token_is_visited_once(name: str) -> None:
    """A path is int64 `(R, L)`, holds every token of the grid once, and -1 at the ends of shorter sequences alone."""
    for spec, rank, layer in itertools.product(variants(PATHS, name), _ranks(name), (0, 1)):

        def check(grid: Grid, spec: dict[str, Any] = spec, layer: int = layer) -> None:
            count = int(torch.tensor(grid).prod())
            for path in _paths(spec, grid, layer):
                told = {"order": spec, "grid": grid, "layer_index": layer, "path": path.tolist()}
                require(path.dtype == torch.int64 and path.ndim == 2, "A path is no int64 matrix.", **told)
                found = path[path >= 0].sort().values
                require(torch.equal(found, torch.arange(count)), "A path does not visit every token once.", **told)
                padding = (path < 0).int()
                last = (padding[:, 1:] >= padding[:, :-1]).all() and (path >= 0).any(1).all()
                require(last and int(path.min()) >= -1, "Padding is not at the ends of sequences.", **told)

        at_the_smallest(check, GRIDS[rank])


@promise("order")
def all_grids_have_as_many_paths(name: str) -> None:
    """The number of paths is the same on every grid, and so are two calls."""
    for spec in variants(PATHS, name):
        grids = [grid for rank in _ranks(name) for grid in GRIDS[rank]]
        counts = {grid: len(_paths(spec, grid)) for grid in grids}
        require(len(set(counts.values())) == 1, "Grids differ in the number of paths.", order=spec, counts=counts)
        again = zip(_paths(spec, grids[-1]), _paths(spec, grids[-1]), strict=True)
        require(all(torch.equal(a, b) for a, b in again), "Two calls differ.", order=spec, grid=grids[-1])


@promise("order")
def what_is_read_is_put_back(name: str) -> None:
    """`unscan` of `scan` gives every path the tokens again, `merge` their sum; the padding of an order holds zeros."""
    for spec, rank in itertools.product(variants(PATHS, name), _ranks(name)):

        def check(grid: Grid, spec: dict[str, Any] = spec) -> None:
            order, x = Order(spec), tokens(2, *grid, DIM)
            x.view(2, -1, DIM)[0, 0] = float("nan")  # the places of padding are filled from the first token
            sequences = order.scan(x)
            back = order.unscan(sequences, grid)
            told = {"order": spec, "grid": grid}
            require(back.shape[1] == order.paths, "The number of paths is another.", **told)
            for path in back.unbind(1):
                require(torch.equal(path.nan_to_num(99.0), x.nan_to_num(99.0)), "`unscan` differs.", **told)
            clean = x.nan_to_num(0.0)
            near(order.merge(order.scan(clean), grid), order.paths * clean, "`merge` is not the sum.", **told)
            real = order.scan_mask(torch.ones(2, *grid, dtype=torch.bool))
            require(not sequences[~real].any(), "Padding of the order is not zero.", **told)

        at_the_smallest(check, GRIDS[rank])


@promise("order")
def every_option_has_an_effect(name: str) -> None:
    """Each option changes a path on some grid, and so does `layer_index` where it is taken."""

    def differs(a: dict[str, Any], b: dict[str, Any], layers: tuple[int, int] = (0, 0)) -> bool:
        for grid in (g for rank in _ranks(name) for g in GRIDS[rank]):
            first, second = _paths(a, grid, layers[0]), _paths(b, grid, layers[1])
            if len(first) != len(second) or any(not torch.equal(p, q) for p, q in zip(first, second, strict=True)):
                return True
        return False

    for option, (beside, value) in _options(PATHS, name).items():
        plain = {"name": name, **beside}
        require(differs(plain, {**plain, option: value}), "An option has no effect.", option=option, value=value)
    if "layer_index" in inspect.signature(PATHS.entries[name]).parameters:
        require(differs({"name": name}, {"name": name}, (0, 1)), "`layer_index` has no effect.")


# -- learned orders, through a mixer that reads by them


def _mixer(spec: dict[str, Any], grid: Grid) -> Any:
    torch.manual_seed(0)
    return perturbed(create_mixer("mamba", DIM, order=spec, grid=grid, d_state=4), std=0.1).eval()


@promise("learned_order")
def it_trains_and_keeps_the_shape(name: str) -> None:
    """A mixer that reads by it keeps the shape, and every parameter of the order gets a finite gradient."""
    for spec, rank in itertools.product(variants(LEARNED, name), (1, 2, 3)):

        def check(grid: Grid, spec: dict[str, Any] = spec) -> None:
            mixer, x = _mixer(spec, grid).train(), tokens(2, *grid, DIM)
            y = mixer(x)
            told = {"order": spec, "grid": grid}
            require(y.shape == x.shape and y.isfinite().all(), "The output is not of the shape, or not finite.", **told)
            y.square().sum().backward()
            for key, parameter in mixer.order.named_parameters():
                grad = torch.zeros(()) if parameter.grad is None else parameter.grad
                require(grad.isfinite().all(), "A gradient is not finite.", parameter=key, **told)
                require(grad.any(), "There is no gradient, or it is zero.", parameter=key, **told)

        check(GRIDS[rank][-1])


@promise("learned_order")
def padding_is_never_read(name: str) -> None:
    """Real tokens do not depend on what stands in padding, NaN among it."""
    for spec in variants(LEARNED, name):
        grid = (4, 3)
        mixer, x = _mixer(spec, grid), tokens(2, *grid, DIM)
        mask = torch.ones(2, *grid, dtype=torch.bool)
        mask[1, :, 0] = False
        expected = mixer(garbled(x, mask, 0.0), mask=mask)[mask]
        y = mixer(garbled(x, mask, float("nan")), mask=mask)[mask]
        near(y, expected, "Padding changes real tokens.", order=spec, grid=grid)


@promise("learned_order", applies=lambda name: bool(_options(LEARNED, name)))
def options_of_a_learned_order_have_an_effect(name: str) -> None:
    """Each option changes the output or the parameters."""
    grid, x = (4, 3), tokens(2, 4, 3, DIM)
    for option, (beside, value) in _options(LEARNED, name).items():
        plain = {"name": name, **beside}
        first, second = _mixer(plain, grid), _mixer({**plain, option: value}, grid)
        shapes = [[p.shape for p in m.parameters()] for m in (first, second)]
        same = shapes[0] == shapes[1] and torch.equal(first(x), second(x))
        require(not same, "An option has no effect.", option=option, value=value)

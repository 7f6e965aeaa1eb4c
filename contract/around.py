"""What the parts around token mixers promise: norms, activations, channel mixers, stems and heads.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..mixers.part import stated
from ..models.parts.channel_mixers import CHANNEL_MIXERS
from ..models.parts.norms import ACTIVATIONS, NORMS
from ..schema import Parts, keyword_options
from .base import at_the_smallest, kind_of_part, promise, require
from .losses import check_losses
from .tools import GARBAGE, ROUNDED, Grid, garbled, near, other_values, perturbed, refused, tokens

DIM = 32
GRIDS: dict[int, tuple[Grid, ...]] = {1: ((2,), (5,)), 2: ((2, 2), (4, 3)), 3: ((2, 2, 2), (2, 3, 4))}
KINDS: dict[str, Parts] = {"norm": NORMS, "activation": ACTIVATIONS, "channel_mixer": CHANNEL_MIXERS}


def names_of(kind: str) -> Callable[[], list[str]]:
    return lambda: list(KINDS[kind].entries)


for _kind in KINDS:
    kind_of_part(_kind, names_of(_kind))


def part_of(kind: str, name: str) -> Any:
    """The class or function of a name."""
    return KINDS[kind].entries[name]


def build(kind: str, name: str, **options: Any) -> nn.Module:
    """The part, with noise on what it learns, in evaluation mode."""
    torch.manual_seed(0)
    arguments = () if kind == "activation" else (DIM,)
    made = KINDS[kind].build({"name": name, **options} if options else name, *arguments, key=kind)
    return perturbed(made).eval()


def all_grids(kind: str, name: str) -> Iterator[tuple[Grid, ...]]:
    return (GRIDS[rank] for rank in stated(part_of(kind, name), "axes"))


def _class_data_are_stated(kind: str, name: str) -> None:
    part = part_of(kind, name)
    require(set(stated(part, "axes")) <= {1, 2, 3} and stated(part, "axes"), "`axes` are ranks of grids.")
    options = keyword_options(part, KINDS[kind].reserved)
    unknown = sorted(set(stated(part, "alternatives")) - set(options))
    require(not unknown, "`alternatives` names options that do not exist.", options=unknown)
    other_values(options, stated(part, "alternatives"), stated(part, "inert"))
    if kind == "channel_mixer":
        takes = inspect.signature(part.forward).parameters
        for argument in ("mask", "document_ids"):
            keyword = argument in takes and takes[argument].kind is inspect.Parameter.KEYWORD_ONLY
            require(keyword, "`forward` lacks a keyword.", argument=argument)


def _shape_dtype_and_gradients(kind: str, name: str) -> None:
    for grids in all_grids(kind, name):
        for dtype in (torch.float32, torch.bfloat16):

            def check(grid: Grid, dtype: torch.dtype = dtype) -> None:
                part, x = build(kind, name).to(dtype), tokens(2, *grid, DIM).to(dtype).requires_grad_()
                y = part(x)
                told = {"grid": grid, "dtype": dtype}
                require(y.shape == x.shape and y.dtype == dtype, "Shape or dtype is changed.", **told)
                require(y.isfinite().all(), "The output is not finite.", **told)
                if not y.requires_grad:
                    require(False, "The output has no gradient.", **told)
                y.float().square().sum().backward()
                for key, parameter in (("input", x), *part.named_parameters()):
                    grad = parameter.grad
                    require(grad is not None and grad.isfinite().all(), "No finite gradient.", of=key, **told)

            check(grids[-1])


def _tokens_mix_as_stated(kind: str, name: str) -> None:
    mixes = stated(part_of(kind, name), "mixes_tokens")
    for grids in all_grids(kind, name):

        def check(grid: Grid) -> None:
            part, x = build(kind, name), tokens(2, *grid, DIM).requires_grad_()
            y = part(x).flatten(1, -2)
            at = y.shape[1] // 2
            (grad,) = torch.autograd.grad(y[:, at].square().sum(), x)
            grad = grad.flatten(1, -2)
            own, largest = float(grad[:, at].abs().max()), float(grad.abs().max())
            others = torch.cat([grad[:, :at], grad[:, at + 1 :]], 1)
            seen = float(others.abs().max())
            require(own > 0, "A token does not depend on itself.", grid=grid)
            if mixes:
                require(seen > 0, "`mixes_tokens` is stated, but no other token is seen.", grid=grid)
            else:
                require(seen <= ROUNDED * largest, "Tokens are mixed, which `mixes_tokens` does not say.", grid=grid)
            if stated(part_of(kind, name), "causal"):
                later = float(grad[:, at + 1 :].abs().max())
                require(later <= ROUNDED * largest, "The future is seen, which `causal` denies.", grid=grid)

        at_the_smallest(check, grids)


def _samples_mix_as_stated(kind: str, name: str) -> None:
    mixes = stated(part_of(kind, name), "mixes_batch")
    for grids in all_grids(kind, name):

        def check(grid: Grid) -> None:
            for training in (False, True):
                part = build(kind, name).train(training)
                x = tokens(3, *grid, DIM).requires_grad_()
                (grad,) = torch.autograd.grad(part(x)[0].square().sum(), x)
                seen, largest = float(grad[1:].abs().max()), float(grad.abs().max())
                told = {"grid": grid, "training": training}
                if mixes and training:
                    require(seen > 0, "`mixes_batch` is stated, but no other sample is seen.", **told)
                else:
                    require(seen <= ROUNDED * largest, "Samples are mixed, which `mixes_batch` does not say.", **told)

        at_the_smallest(check, grids)


def _the_same_weights_give_the_same_numbers(kind: str, name: str) -> None:
    grid = GRIDS[stated(part_of(kind, name), "axes")[-1]][-1]
    first, second, x = build(kind, name), perturbed(build(kind, name), seed=5), tokens(2, *grid, DIM)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        require(torch.equal(first(x), first(x)), "Two calls differ.", grid=grid)
        require(torch.equal(first(x), second(x)), "The state dict does not hold everything.", grid=grid)


def _every_option_has_an_effect(kind: str, name: str) -> None:
    part = part_of(kind, name)
    options = keyword_options(part, KINDS[kind].reserved)
    grid = GRIDS[stated(part, "axes")[-1]][-1]
    x = 0.3 * tokens(2, *grid, DIM)
    for option, (_, value) in other_values(options, stated(part, "alternatives"), stated(part, "inert")).items():
        given = dict(stated(part, "requires").get(option, {}))
        seen = []
        for chosen in (given, {**given, option: value}):
            made = build(kind, name, **chosen).train()
            torch.manual_seed(5)
            with torch.no_grad():
                made(x)  # what a norm keeps of a batch counts too
                kept = made(x)
                seen.append((kept, made.eval()(x), [tuple(p.shape) for p in made.parameters()]))
        (a, b, shapes), (c, d, others) = seen
        changed = shapes != others or not (torch.equal(a, c) and torch.equal(b, d))
        require(changed, "An option has no effect.", option=option, value=value, beside=given)


def _auxiliary_losses_are_stated(kind: str, name: str) -> None:
    grid = GRIDS[stated(part_of(kind, name), "axes")[-1]][-1]
    check_losses(build(kind, name), tokens(2, *grid, DIM), stated=stated(part_of(kind, name), "aux_losses"))


SHARED = {
    "class_data_are_stated": (_class_data_are_stated, "Class data and signatures are what the kind needs."),
    "shape_dtype_and_gradients": (
        _shape_dtype_and_gradients,
        "`(B, *grid, C)` comes out as it went in, and gradients reach everything, in float32 and bfloat16.",
    ),
    "tokens_mix_as_stated": (_tokens_mix_as_stated, "By gradient, tokens see each other exactly if `mixes_tokens`."),
    "samples_mix_as_stated": (
        _samples_mix_as_stated,
        "By gradient, samples see each other exactly in training and if `mixes_batch`.",
    ),
    "the_same_weights_give_the_same_numbers": (
        _the_same_weights_give_the_same_numbers,
        "Two calls agree exactly, and so does another part after `load_state_dict`.",
    ),
    "every_option_has_an_effect": (
        _every_option_has_an_effect,
        "Each option changes the output or the parameters, unless it is declared inert.",
    ),
    "auxiliary_losses_are_stated": (
        _auxiliary_losses_are_stated,
        "In training the part adds the losses of `aux_losses` and no others, and they train what it says.",
    ),
}


def _enter(kind: str, name: str, body: Callable[[str, str], None], statement: str) -> None:
    def check(part: str) -> None:
        body(kind, part)

    check.__name__, check.__doc__ = name, statement
    promise(kind)(check)


for _kind in KINDS:
    for _name, (_body, _statement) in SHARED.items():
        _enter(_kind, _name, _body, _statement)


# -- channel mixers


def _alone(name: str) -> bool:
    return not stated(part_of("channel_mixer", name), "mixes_tokens")


@promise("channel_mixer")
def padding_is_never_read(name: str) -> None:
    """Real tokens do not depend on padding, NaN and infinity among it; a mixing part that cannot say so refuses."""
    part = part_of("channel_mixer", name)
    for grids in all_grids("channel_mixer", name):

        def check(grid: Grid) -> None:
            made, x = build("channel_mixer", name), tokens(2, *grid, DIM)
            mask = torch.ones(2, *grid, dtype=torch.bool)
            mask[1, ..., 0] = False
            if stated(part, "mixes_tokens") and not stated(part, "masks"):
                require(refused(lambda: made(x, mask=mask), "mask"), "A mask is not refused.", grid=grid)
                return
            expected = made(garbled(x, mask, 0.0), mask=mask)[mask]
            for what, value in GARBAGE.items():
                y = made(garbled(x, mask, value), mask=mask)[mask]
                near(y, expected, "Padding changes real tokens.", grid=grid, holds=what)
            if _alone(name):
                near(made(x, mask=mask)[mask], made(x)[mask], "A mask changes real tokens.", grid=grid)

        at_the_smallest(check, grids)


@promise("channel_mixer")
def documents_stay_apart(name: str) -> None:
    """Packed documents do not see each other; a mixing part that cannot say so refuses."""
    part = part_of("channel_mixer", name)
    rank = stated(part, "axes")[0]

    def check(grid: Grid) -> None:
        made, x = build("channel_mixer", name), tokens(2, *grid, DIM)
        ids = torch.zeros(2, *grid, dtype=torch.int64)
        ids[..., grid[-1] // 2 :] = 1
        if stated(part, "mixes_tokens") and not stated(part, "packs"):
            require(refused(lambda: made(x, document_ids=ids), "document_ids"), "They are not refused.", grid=grid)
            return
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(made(x, document_ids=ids)[ids == 1].square().sum(), x)
        leak = float(grad[ids == 0].abs().max())
        require(leak <= ROUNDED * float(grad.abs().max()), "A gradient crosses the border.", grid=grid)

    at_the_smallest(check, GRIDS[rank])


@promise("channel_mixer", applies=lambda name: _alone(name) and 1 in stated(part_of("channel_mixer", name), "axes"))
def single_tokens_are_as_in_a_sequence(name: str) -> None:
    """A token `(B, C)`, as decoding gives it, gets what it gets in its sequence."""
    made, x = build("channel_mixer", name), tokens(2, 5, DIM)
    with torch.no_grad():
        near(torch.stack([made(x[:, t]) for t in range(5)], 1), made(x), "A single token differs.")


# -- activations


@promise("activation")
def elements_are_treated_alone(name: str) -> None:
    """By gradient, an element depends on itself alone."""
    made, x = build("activation", name), (tokens(2, 3, 4) + 0.1).requires_grad_()
    (grad,) = torch.autograd.grad(made(x)[0, 1, 2], x)
    grad = grad.clone()
    grad[0, 1, 2] = 0
    seen = float(grad.abs().max())
    require(seen == 0, "An element depends on others.", gradient=seen)


@promise("activation")
def the_grid_does_not_matter(name: str) -> None:
    """The same numbers in another shape give the same numbers."""
    made, x = build("activation", name), tokens(24)
    near(made(x.view(2, 3, 4)).flatten(), made(x), "The shape changes the result.")

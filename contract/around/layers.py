"""What norms, activations and channel mixers promise besides what `shared.py` holds all kinds to.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...mixers.part import stated
from ...models.parts.channel_mixers import CHANNEL_MIXERS
from ...models.parts.norms import ACTIVATIONS, NORMS
from ...schema import Parts
from ..base import at_the_smallest, promise, require
from ..tools import GARBAGE, ROUNDED, Grid, garbled, near, refused, tokens
from .shared import DIM, Kind, share

GRIDS: dict[int, tuple[Grid, ...]] = {1: ((2,), (5,)), 2: ((2, 2), (4, 3)), 3: ((2, 2, 2), (2, 3, 4))}


def _kind(name: str, parts: Parts, *arguments: Any) -> Kind:
    def make(part: str, grid: Grid, **options: Any) -> nn.Module:
        return parts.build({"name": part, **options} if options else part, *arguments, key=name)

    def inputs(part: nn.Module, batch: int, grid: Grid) -> Tensor:
        return tokens(batch, *grid, DIM)

    def shape(part: nn.Module, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    return Kind(name, parts, GRIDS, make, inputs, lambda part, x: part(x), shape)


NORM, ACTIVATION = _kind("norm", NORMS, DIM), _kind("activation", ACTIVATIONS)
CHANNEL_MIXER = _kind("channel_mixer", CHANNEL_MIXERS, DIM)
for _one in (NORM, ACTIVATION, CHANNEL_MIXER):
    share(_one)


def _tokens_mix_as_stated(kind: Kind, name: str) -> None:
    part = kind.entry(name)
    mixes, causal = stated(part, "mixes_tokens"), stated(part, "causal")
    for grids in kind.all_grids(name):

        def check(grid: Grid) -> None:
            made, x = kind.build(name, grid), tokens(2, *grid, DIM).requires_grad_()
            y = made(x).flatten(1, -2)
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
            if causal:
                later = float(grad[:, at + 1 :].abs().max())
                require(later <= ROUNDED * largest, "The future is seen, which `causal` denies.", grid=grid)

        at_the_smallest(check, grids)


def _promise_that_tokens_mix(kind: Kind) -> None:
    def tokens_mix_as_stated(name: str) -> None:
        """By gradient, tokens see each other exactly if `mixes_tokens`."""
        _tokens_mix_as_stated(kind, name)

    promise(kind.name)(tokens_mix_as_stated)


for _one in (NORM, ACTIVATION, CHANNEL_MIXER):
    _promise_that_tokens_mix(_one)


# -- channel mixers


def _alone(name: str) -> bool:
    return not stated(CHANNEL_MIXER.entry(name), "mixes_tokens")


@promise("channel_mixer")
def masks_and_documents_are_keywords(name: str) -> None:
    """`forward` takes `mask` and `document_ids` by keyword."""
    takes = inspect.signature(CHANNEL_MIXER.entry(name).forward).parameters
    for argument in ("mask", "document_ids"):
        keyword = argument in takes and takes[argument].kind is inspect.Parameter.KEYWORD_ONLY
        require(keyword, "`forward` lacks a keyword.", argument=argument)


@promise("channel_mixer")
def padding_is_never_read(name: str) -> None:
    """Real tokens do not depend on padding, NaN and infinity among it; a mixing part that cannot say so refuses."""
    part = CHANNEL_MIXER.entry(name)
    for grids in CHANNEL_MIXER.all_grids(name):

        def check(grid: Grid) -> None:
            made, x = CHANNEL_MIXER.build(name, grid), tokens(2, *grid, DIM)
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
    part = CHANNEL_MIXER.entry(name)
    rank = stated(part, "axes")[0]

    def check(grid: Grid) -> None:
        made, x = CHANNEL_MIXER.build(name, grid), tokens(2, *grid, DIM)
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


@promise("channel_mixer", applies=lambda name: _alone(name) and 1 in stated(CHANNEL_MIXER.entry(name), "axes"))
def single_tokens_are_as_in_a_sequence(name: str) -> None:
    """A token `(B, C)`, as decoding gives it, gets what it gets in its sequence."""
    made, x = CHANNEL_MIXER.build(name, (5,)), tokens(2, 5, DIM)
    with torch.no_grad():
        near(torch.stack([made(x[:, t]) for t in range(5)], 1), made(x), "A single token differs.")


# -- activations


@promise("activation")
def elements_are_treated_alone(name: str) -> None:
    """By gradient, an element depends on itself alone."""
    made, x = ACTIVATION.build(name, ()), (tokens(2, 3, 4) + 0.1).requires_grad_()
    (grad,) = torch.autograd.grad(made(x)[0, 1, 2], x)
    grad = grad.clone()
    grad[0, 1, 2] = 0
    seen = float(grad.abs().max())
    require(seen == 0, "An element depends on others.", gradient=seen)


@promise("activation")
def the_grid_does_not_matter(name: str) -> None:
    """The same numbers in another shape give the same numbers."""
    made, x = ACTIVATION.build(name, ()), tokens(24)
    near(made(x.view(2, 3, 4)).flatten(), made(x), "The shape changes the result.")

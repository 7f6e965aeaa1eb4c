"""What blocks promise: they hand masks and documents on, mix nothing themselves, and honour what stands around mixers.

Axis letters: B batch, N tokens, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers import Mixer, create_mixer, mixer_class
from ...mixers.part import stated
from ...models.parts.blocks import BLOCKS, Block, Kept
from ...models.parts.channel_mixers import ChannelMixer
from ...schema import split_spec
from ..base import at_the_smallest, promise, require
from ..tools import GARBAGE, ROUNDED, Grid, garbled, grid_masks, near, tokens
from .shared import DIM, Kind, differ, share

GRIDS: dict[int, tuple[Grid, ...]] = {1: ((3,), (12,)), 2: ((2, 3), (4, 3)), 3: ((2, 2, 2), (2, 3, 4))}
# what a configuration may put around a token mixer, with another value than the one the block is built with
AROUND: Mapping[str, tuple[Any, Any]] = {
    "norm": ("layer_norm", "rms_norm"),
    "channel_mixer": ("mlp", {"name": "mlp", "ratio": 2.0}),
    "layer_scale": (None, 0.5),
    "res_scale": (None, 0.5),
    "drop_path": (0.0, 0.9),
}


def _mixer(name: str) -> tuple[str, dict[str, Any]]:
    return split_spec(getattr(BLOCKS.entries[name], "tried_with", Block.tried_with), kind="mixer")


def _make(name: str, grid: Grid, *, mixer: Any = None, causal: bool = False, **options: Any) -> nn.Module:
    word, given = _mixer(name) if mixer is None else (mixer, {})
    built = create_mixer(word, DIM, grid=grid, causal=causal, **given)
    around = {option: options.pop(option, first) for option, (first, _) in AROUND.items()}
    return BLOCKS.build({"name": name, **options}, DIM, key="block", defaults={}, mixer=built, **around)


def _token_mixer(block: nn.Module) -> Mixer:
    return next(m for m in block.modules() if isinstance(m, Mixer))


def _inputs(block: nn.Module, batch: int, grid: Grid) -> Tensor:
    if _token_mixer(block).class_token:
        return tokens(batch, 1 + int(torch.tensor(grid).prod()), DIM)
    return tokens(batch, *grid, DIM)


def _call(block: nn.Module, x: Tensor, **beside: Tensor) -> Tensor:
    y = block(x, **beside)
    return y.x if isinstance(y, Kept) else y


def _plain(name: str) -> bool:
    """Whether the block takes any mixer, so that what it does itself can be told from what its mixer does."""
    return _mixer(name)[0] == Block.tried_with


def _ranks(name: str) -> list[int]:
    """Ranks of grid that the block and the mixer that it is tried with both take."""
    return [rank for rank in stated(BLOCKS.entries[name], "axes") if rank in mixer_class(_mixer(name)[0]).axes]


BLOCK = Kind("block", BLOCKS, GRIDS, _make, _inputs, _call, lambda block, x: tuple(x.shape), _ranks)
share(BLOCK)


@promise("block")
def masks_and_documents_are_keywords(name: str) -> None:
    """`forward` takes `mask` and `document_ids` by keyword."""
    takes = inspect.signature(BLOCKS.entries[name].forward).parameters
    for argument in ("mask", "document_ids"):
        keyword = argument in takes and takes[argument].kind is inspect.Parameter.KEYWORD_ONLY
        require(keyword, "`forward` lacks a keyword.", argument=argument)


@promise("block", applies=_plain)
def a_block_mixes_nothing_itself(name: str) -> None:
    """By gradient, it mixes no tokens around a mixer that does not, and shows no future around a causal one."""
    for mixer, rank in (("identity", 1), ("identity", 2), ("identity", 3), ("attention", 1)):
        if rank not in _ranks(name):
            continue

        def check(grid: Grid, mixer: str = mixer) -> None:
            for training in (False, True):
                block = BLOCK.build(name, grid, mixer=mixer, causal=mixer == "attention").train(training)
                x = tokens(2, *grid, DIM).requires_grad_()
                y = _call(block, x).flatten(1, -2)
                at = y.shape[1] // 2
                (grad,) = torch.autograd.grad(y[:, at].square().sum(), x)
                grad = grad.flatten(1, -2)
                hidden = grad[:, at + 1 :] if mixer == "attention" else torch.cat([grad[:, :at], grad[:, at + 1 :]], 1)
                told = {"grid": grid, "mixer": mixer, "training": training}
                require(float(grad[:, at].abs().max()) > 0, "A token does not depend on itself.", **told)
                seen = float(hidden.abs().max())
                require(seen <= ROUNDED * float(grad.abs().max()), "Tokens are mixed by the block.", **told)

        at_the_smallest(check, GRIDS[rank])


@promise("block")
def padding_is_never_read(name: str) -> None:
    """Real tokens do not depend on padding, NaN and infinity among it."""
    for rank in _ranks(name):
        if not mixer_class(_mixer(name)[0]).masks:
            continue

        def check(grid: Grid) -> None:
            block = BLOCK.build(name, grid)
            x = _inputs(block, 3 if len(grid) == 1 else 2, grid)
            for side, mask in grid_masks(tuple(x.shape[1:-1])).items():
                if _token_mixer(block).class_token:
                    mask[:, 0] = True
                expected = _call(block, garbled(x, mask, 0.0), mask=mask)[mask]
                for holds, value in GARBAGE.items():
                    y = _call(block, garbled(x, mask, value), mask=mask)[mask]
                    near(y, expected, "Padding changes real tokens.", grid=grid, padding=side, holds=holds)

        at_the_smallest(check, GRIDS[rank])


@promise("block")
def masks_and_documents_are_handed_on(name: str) -> None:
    """The token mixer and the channel mixer get the mask and, where the block takes them, the documents."""
    rank = _ranks(name)[0]
    block = BLOCK.build(name, GRIDS[rank][-1])
    x, mixer = _inputs(block, 2, GRIDS[rank][-1]), _token_mixer(block)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    mask[1, ..., -1:] = False
    ids = torch.zeros(x.shape[:-1], dtype=torch.int64)
    beside = {"mask": mask} if mixer.masks else {}
    if mixer.packs:
        beside["document_ids"] = ids
    watched = [m for m in block.modules() if m is mixer or isinstance(m, ChannelMixer)]
    seen: list[tuple[str, Mapping[str, Any]]] = []
    for part in watched:

        def look(part: nn.Module, _: Any, given: Mapping[str, Any]) -> None:
            seen.append((type(part).__name__, given))

        part.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        block(x, **beside)
    require(len(seen) == len(watched), "A mixer is not called once.", called=[who for who, _ in seen])
    for who, given in seen:
        for argument, value in beside.items():
            require(
                given.get(argument) is value,
                "A mixer does not get what the block was given.",
                of=who,
                argument=argument,
            )


@promise("block")
def what_stands_around_has_an_effect(name: str) -> None:
    """Norm, channel mixer, scales and stochastic depth change something, or are refused by name."""
    grid = GRIDS[_ranks(name)[-1]][-1]
    for option, (first, other) in AROUND.items():
        try:
            changed = differ(BLOCK, name, grid, {option: first}, {option: other})
        except OptionError as error:
            require(error.head == option, "What the block does not take is not refused by its name.", option=option)
            continue
        require(changed, "What stands around the mixer has no effect, and is not refused.", option=option, value=other)


@promise("block")
def scales_are_reset(name: str) -> None:
    """`reset_parameters` gives the scales of the block their initial values again."""
    grid = GRIDS[_ranks(name)[-1]][-1]
    given: Any
    for given in ({"layer_scale": 0.25}, {"res_scale": 0.75}):
        try:
            block: Any = _make(name, grid, **given)
        except OptionError:  # what is not taken is looked at above
            continue
        before = {key: value.detach().clone() for key, value in block.named_parameters(recurse=False)}
        with torch.no_grad():
            for value in block.parameters(recurse=False):
                value.fill_(float("nan"))
        if before:
            block.reset_parameters()
        for key, value in block.named_parameters(recurse=False):
            require(torch.equal(value, before[key]), "A scale is not reset.", scale=key)


@promise("block", applies=lambda name: bool(getattr(BLOCKS.entries[name], "prunes", False)))
def what_is_dropped_stays_dropped(name: str) -> None:
    """The mask that comes out is part of the one that went in, and the tokens that it drops are zeros."""
    grid = GRIDS[_ranks(name)[-1]][-1]
    for options in ({}, *({option: value} for option, (_, value) in BLOCK.options(name).items())):
        block = BLOCK.build(name, grid, **options)
        x, mask = _inputs(block, 2, grid), None
        for step in range(2):
            with torch.no_grad():
                out = block(x) if mask is None else block(x, mask=mask)
            require(isinstance(out, Kept), "A block that `prunes` gives no `Kept`.", options=options)
            if out.mask is None:
                break
            require(out.mask.shape == x.shape[:-1], "The mask has another shape than the tokens.", options=options)
            before = torch.ones_like(out.mask) if mask is None else mask
            require(not (out.mask & ~before).any(), "A token that was dropped comes back.", step=step, options=options)
            require(not out.x[~out.mask].any(), "A token that is dropped is not zero.", step=step, options=options)
            x, mask = out.x, out.mask

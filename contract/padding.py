"""What token mixers promise about padding and packed documents.

Axis letters: B batch, N tokens, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..mixers import Mixer, mixer_class
from .base import at_the_smallest, promise, require
from .mixers import DIM, GRIDS, KIND, Options, all_grids, build, can_be_causal, last_grid, variants
from .tools import GARBAGE, ROUNDED, Grid, garbled, grid_masks, near, perturbed, refused, sequence_masks, tokens


def honours_masks(name: str) -> bool:
    return mixer_class(name).masks


def packs(name: str) -> bool:
    return mixer_class(name).packs


@promise(KIND, applies=lambda name: not honours_masks(name))
def a_mask_is_refused(name: str) -> None:
    """A mixer that cannot honour a mask says so."""
    grid = last_grid(name)
    mixer, mask = build(name, grid), torch.ones(2, *grid, dtype=torch.bool)
    what = "A mask is neither honoured nor refused: `self.refuse_mask(mask)`, or `masks = True`."
    require(refused(lambda: mixer(tokens(2, *grid, DIM), mask=mask), "mask"), what)


@promise(KIND, applies=honours_masks)
def padding_is_never_read(name: str) -> None:
    """Real tokens do not depend on what stands in padded places, NaN and infinity among it, nor by gradient."""
    forms = [False, True] if mixer_class(name).causal == "can" else [False]
    for causal in forms:
        for grids in [GRIDS[1]] if causal else all_grids(name):

            def check(grid: Grid, causal: bool = causal) -> None:
                mixer = perturbed(build(name, grid, causal=causal))
                for side, mask in grid_masks(grid).items():
                    x = tokens(len(mask), *grid, DIM)
                    clean = torch.where(mask.unsqueeze(-1), x, 0.0).requires_grad_()
                    expected = mixer(clean, mask=mask)
                    told: dict[str, Any] = {"grid": grid, "padding": side, "causal": causal}
                    require(expected[mask].isfinite().all(), "Not finite with a mask.", **told)
                    (grad,) = torch.autograd.grad(expected[mask].square().sum(), clean)
                    leak = float(grad[~mask].abs().max()) if (~mask).any() else 0.0
                    require(leak <= ROUNDED * float(grad.abs().max()), "Padding has a gradient.", **told)
                    for what, value in GARBAGE.items():
                        y = mixer(garbled(x, mask, value), mask=mask)
                        near(y[mask], expected[mask], "Padding changes real tokens.", **told, holds=what)

            at_the_smallest(check, grids)


@promise(KIND, applies=lambda name: honours_masks(name) and name != "identity")
def a_mask_has_an_effect(name: str) -> None:
    """Tokens behind padding on the left get another result than without the mask."""
    for grids in all_grids(name):
        grid = grids[-1]
        mixer, mask = perturbed(build(name, grid)), grid_masks(grid)["left"]
        x = tokens(len(mask), *grid, DIM)
        y, unmasked = mixer(x, mask=mask), mixer(x)
        same = torch.allclose(y[mask], unmasked[mask], rtol=1e-5, atol=1e-6)
        require(not same, "The mask is ignored.", grid=grid)


def passes_over_padding(name: str) -> bool:
    """Whether padding takes no place among the real tokens: in mixers of sequences that pack or stream."""
    cls = mixer_class(name)
    return cls.masks and can_be_causal(name) and (cls.packs or cls.streams)


@promise(KIND, applies=passes_over_padding)
def a_padded_row_is_as_if_alone(name: str, given: Options | None = None) -> None:
    """In the causal form, padding anywhere, a row's real tokens get what they get alone."""
    for options in variants(name, causal=True, given=given):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            length = grid[0]
            mixer = perturbed(build(name, grid, causal=True, **options))
            for side, mask in sequence_masks(length).items():
                x = tokens(3, length, DIM)
                y = mixer(garbled(x, mask, float("nan")), mask=mask)
                for row in range(3):
                    alone = mixer(x[row : row + 1, mask[row]])[0]
                    near(
                        y[row, mask[row]], alone, "A padded row differs from the row alone.",
                        length=length, padding=side, mask=mask[row].int().tolist(), options=options,
                    )  # fmt: skip

        at_the_smallest(check, GRIDS[1])


def _documents(length: int) -> tuple[Tensor, Tensor]:
    """Document ids and a mask `(2, N)`: three documents each, the third with the id of the first.

    Padding stands before and within documents of row 0, and is all of the second document of row 1.
    """
    first, second = length // 3, 2 * length // 3
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[:, first:second] = torch.tensor([[1], [7]])
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 0] = False
    mask[0, length // 2 :: 4] = False
    mask[1, first:second] = False
    return ids, mask


def _pieces(ids: Tensor) -> Iterator[tuple[int, slice]]:
    """Row and place of every document."""
    for row, line in enumerate(ids.tolist()):
        start = 0
        for stop in range(1, len(line) + 1):
            if stop == len(line) or line[stop] != line[stop - 1]:
                yield row, slice(start, stop)
                start = stop


def _form(name: str, grid: Grid, causal: bool, options: dict[str, Any], ids: Tensor) -> Mixer | None:
    """The mixer, or None where this form refuses `document_ids`, which only the other one may."""
    mixer = perturbed(build(name, grid, causal=causal, **options))
    try:
        with torch.no_grad():
            mixer(tokens(2, grid[0], DIM), document_ids=ids)
    except ConfigError as refusal:
        require("document_ids" in str(refusal), f"Refused, but not for `document_ids`: {refusal}", options=options)
        return None
    return mixer


@promise(KIND, applies=lambda name: packs(name) and can_be_causal(name))
def documents_are_as_if_alone(name: str, given: Options | None = None) -> None:
    """In the causal form each packed document gets what it gets alone, with padding within and before it too."""
    honoured = 0
    for options in variants(name, causal=True, given=given):
        honoured += _try_documents(name, GRIDS[1], options)
    require(honoured, "No causal form takes `document_ids`.")
    _try_documents(name, ((40,),), dict(given or {}))


def _try_documents(name: str, grids: tuple[Grid, ...], options: dict[str, Any]) -> bool:
    took = False

    def check(grid: Grid) -> None:
        nonlocal took
        length = grid[0]
        ids, some = _documents(length)
        mixer = _form(name, grid, True, options, ids)
        if mixer is None:
            return
        took = True
        x = tokens(2, length, DIM)
        for mask in (None, some):
            real = torch.ones_like(some) if mask is None else mask
            y = mixer(x if mask is None else garbled(x, mask, float("nan")), mask=mask, document_ids=ids)
            for row, at in _pieces(ids):
                kept = real[row, at]
                if kept.any():
                    near(
                        y[row, at][kept], mixer(x[row : row + 1, at][:, kept])[0],
                        "A packed document differs from the document alone.",
                        document_ids=ids[row].tolist(), mask=real[row].int().tolist(), at=(at.start, at.stop),
                        options=options,
                    )  # fmt: skip

    at_the_smallest(check, grids)
    return took


@promise(KIND, applies=packs)
def documents_stay_apart(name: str) -> None:
    """No gradient crosses from one packed document into another, causal or not."""
    forms = {"can": [False, True], "always": [True], "cannot": [False]}[mixer_class(name).causal]
    honoured = 0
    for causal in forms:
        for options in variants(name, causal=causal):
            grid = GRIDS[1][-1]
            ids, mask = _documents(grid[0])
            mixer = _form(name, grid, causal, options, ids)
            if mixer is None:
                continue
            honoured += 1
            for real in (None, mask):
                x = tokens(2, grid[0], DIM).requires_grad_()
                y = mixer(x, mask=real, document_ids=ids)
                kept = torch.ones_like(mask) if real is None else real
                for row, at in _pieces(ids):
                    inside = torch.zeros_like(mask)
                    inside[row, at] = kept[row, at]
                    if not inside.any():
                        continue
                    (grad,) = torch.autograd.grad(y[inside].square().sum(), x, retain_graph=True)
                    leak = float(grad[~inside].abs().max())
                    require(
                        leak <= ROUNDED * float(grad.abs().max()), "A gradient crosses the border of a document.",
                        document_ids=ids[row].tolist(), mask=kept[row].int().tolist(), at=(at.start, at.stop),
                        causal=causal, options=options,
                    )  # fmt: skip
    require(honoured, "No form takes `document_ids`, which `packs` says.")

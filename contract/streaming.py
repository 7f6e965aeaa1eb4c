"""What a causal token mixer that streams promises: decoding equals the parallel forward, however it is cut.

Axis letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from ..mixers import Mixer, mixer_class
from ..mixers.state import map_state, reorder_state, state_bytes
from .base import at_the_smallest, promise, require
from .mixers import DIM, GRIDS, KIND, Options, build, can_be_causal, variants
from .tools import Grid, garbled, near, perturbed, refused, sequence_masks, tokens

LONG = 150  # more than a chunk of the scans


def streams(name: str) -> bool:
    return mixer_class(name).streams and can_be_causal(name)


def _stepped(mixer: Mixer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Outputs of `step` for tokens (B, N, C), one after another."""
    outputs = []
    for t in range(x.shape[1]):
        y_t, state = mixer.step(x[:, t], state)
        outputs.append(y_t)
    return (torch.stack(outputs, 1) if outputs else x), state


def _mixer(name: str, grid: Grid, options: dict[str, Any]) -> Mixer:
    return perturbed(build(name, grid, causal=True, **options))


@promise(KIND, applies=lambda name: can_be_causal(name) and not mixer_class(name).streams)
def streaming_is_refused(name: str) -> None:
    """A causal mixer that does not stream says so."""
    mixer = build(name, GRIDS[1][-1], causal=True)
    require(refused(lambda: mixer.init_state(1), "stream"), "`init_state` does not refuse.")
    require(refused(lambda: mixer.step(tokens(1, DIM), ()), "stream"), "`step` does not refuse.")


@promise(KIND, applies=streams, about="step")
def steps_equal_the_forward(name: str, given: Options | None = None) -> None:
    """Token by token from `init_state` gives what `forward` gives, at every position."""
    for options in variants(name, causal=True, given=given):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            mixer, x = _mixer(name, grid, options), tokens(2, grid[0], DIM)
            with torch.no_grad():
                near(
                    _stepped(mixer, x, mixer.init_state(2))[0], mixer(x), "`step` differs from `forward`.",
                    length=grid[0], options=options,
                )  # fmt: skip

        at_the_smallest(check, GRIDS[1] if options and given is None else (*GRIDS[1], (LONG,)))


@promise(KIND, applies=streams, about="prefill")
def a_sequence_can_be_cut_anywhere(name: str, given: Options | None = None) -> None:
    """`prefill` of any two pieces, or of one piece and steps, gives what `forward` gives: the state carries over."""
    for options in variants(name, causal=True, given=given):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            length = grid[0]
            mixer, x = _mixer(name, grid, options), tokens(2, length, DIM)
            cuts = range(1, length) if length <= 12 else (1, 63, 64, 65, length - 1)
            told: dict[str, Any] = {"length": length, "options": options}
            with torch.no_grad():
                expected = mixer(x)
                for cut in cuts:
                    first, state = mixer.prefill(x[:, :cut])
                    near(first, expected[:, :cut], "`prefill` differs from `forward`.", **told, cut=cut)
                    kept = map_state(torch.clone, state)  # a state given may be changed in place
                    second, _ = mixer.prefill(x[:, cut:], state=state)
                    near(second, expected[:, cut:], "A second `prefill` does not continue.", **told, cut=cut)
                    if length <= 12:
                        later, _ = _stepped(mixer, x[:, cut:], kept)
                        near(later, expected[:, cut:], "`step` does not continue a `prefill`.", **told, cut=cut)

        at_the_smallest(check, GRIDS[1] if options and given is None else (*GRIDS[1], (LONG,)))


@promise(KIND, applies=lambda name: streams(name) and mixer_class(name).masks)
def a_padded_prefill_continues_each_row(name: str, given: Options | None = None) -> None:
    """After a `prefill` with padding anywhere, and a second one, every row goes on as if it were alone."""
    for options in variants(name, causal=True, given=given):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            length = grid[0]
            mixer = _mixer(name, (length + 6,), options)
            more = tokens(3, 6, DIM, seed=5)
            keep = torch.ones(3, 3, dtype=torch.bool)
            keep[1, 0] = keep[2, 1] = False
            for side, mask in sequence_masks(length).items():
                x = tokens(3, length, DIM)
                with torch.no_grad():
                    y, state = mixer.prefill(garbled(x, mask, float("nan")), mask=mask)
                    later, state = mixer.prefill(garbled(more[:, :3], keep, float("inf")), mask=keep, state=state)
                    stepped, _ = _stepped(mixer, more[:, 3:], state)
                    for row in range(3):
                        alone = torch.cat([x[row, mask[row]], more[row, :3][keep[row]], more[row, 3:]])
                        got = torch.cat([y[row, mask[row]], later[row, keep[row]], stepped[row]])
                        near(
                            got, mixer(alone[None])[0], "A padded prefill does not continue as the row alone.",
                            length=length, padding=side, mask=mask[row].int().tolist(), options=options,
                        )  # fmt: skip

        at_the_smallest(check, GRIDS[1])


@promise(KIND, applies=lambda name: streams(name) and mixer_class(name).packs)
def packed_documents_equal_streams(name: str, given: Options | None = None) -> None:
    """Each packed document of a `forward` gets what a stream of its own gives, from a fresh state."""

    def check(grid: Grid) -> None:
        length = grid[0]
        mixer, x, cut = _mixer(name, grid, dict(given or {})), tokens(2, length, DIM), length // 2
        ids = torch.zeros(2, length, dtype=torch.int64)
        ids[:, cut:] = 4
        with torch.no_grad():
            y = mixer(x, document_ids=ids)
            for start, stop in ((0, cut), (cut, length)):
                alone, _ = _stepped(mixer, x[:, start:stop], mixer.init_state(2))
                near(y[:, start:stop], alone, "A packed document differs from its stream.", length=length, cut=cut)

    at_the_smallest(check, GRIDS[1])


@promise(KIND, applies=streams)
def rows_of_a_state_can_be_reordered(name: str, given: Options | None = None) -> None:
    """`reorder_state` picks, repeats and drops rows of a batch, as beam search does."""
    rows = torch.tensor([2, 0, 0])
    for options in variants(name, causal=True, given=given):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            length = grid[0]
            mixer, x, cut = _mixer(name, grid, options), tokens(3, length, DIM), length // 2
            with torch.no_grad():
                _, state = mixer.prefill(x[:, :cut])
                y, _ = _stepped(mixer, x[rows][:, cut:], reorder_state(state, rows))
                near(
                    y, mixer(x)[rows][:, cut:], "Reordered rows do not continue.", length=length, cut=cut,
                    options=options,
                )  # fmt: skip

        at_the_smallest(check, GRIDS[1])


@promise(KIND, applies=streams)
def a_state_can_be_saved(name: str) -> None:
    """A state survives `torch.save` and `pickle`, does not hold on to the mixer, and has a size."""
    length, cut = GRIDS[1][-1][0], 5
    mixer, x = _mixer(name, (length,), {}), tokens(2, length, DIM)
    with torch.no_grad():
        expected = mixer(x)[:, cut:]
        _, state = mixer.prefill(x[:, :cut])
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        with torch.serialization.safe_globals([*_types(state)]):
            loaded = torch.load(file, weights_only=True)
        for how, copy in (("torch.save", loaded), ("pickle", pickle.loads(pickle.dumps(state)))):
            require(state_bytes(copy) == state_bytes(state), "A saved state has another size.", how=how)
            near(_stepped(mixer, x[:, cut:], copy)[0], expected, "A saved state does not continue.", how=how)


def _types(state: Any) -> set[type]:
    """The classes of named tuples in a state."""
    if isinstance(state, (tuple, list)):
        own = {type(state)} if hasattr(state, "_fields") else set()
        return own.union(*map(_types, state)) if state else own
    if isinstance(state, dict):
        return set().union(*map(_types, state.values()))
    return set()


@promise(KIND, applies=streams, about="prefill")
def prefill_is_parallel(name: str, given: Options | None = None) -> None:
    """`prefill` reads a padded prompt, and a piece after a state, at once: it never calls `step`."""
    mixer = _mixer(name, GRIDS[1][-1], dict(given or {}))

    def never(*_: Any, **__: Any) -> Any:
        require(False, "`prefill` calls `step`, token by token.")

    mixer.step = never  # type: ignore[method-assign]
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    with torch.no_grad():
        _, state = mixer.prefill(tokens(2, 6, DIM), mask=mask if mixer.masks else None)
        mixer.prefill(tokens(2, 6, DIM, seed=2), state=state)

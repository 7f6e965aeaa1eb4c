"""What token mixers promise about what they read beside the tokens: embeddings and ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixers import mixer_class
from .base import at_the_smallest, promise, require
from .mixers import DIM, GRIDS, KIND, build, can_be_causal
from .tools import Grid, error, near, perturbed, sequence_masks, tokens


def _read(name: str) -> list[str]:
    """The arguments that a mixer reads beside the tokens, by its class data."""
    cls = mixer_class(name)
    return ["embeddings"] * cls.reads_embeddings + ["token_ids"] * cls.reads_ids


def _beside(argument: str, length: int, seed: int) -> Tensor:
    if argument == "embeddings":
        return tokens(3, length, DIM, seed=seed)
    return torch.randint(0, 64, (3, length), generator=torch.Generator().manual_seed(seed))


@promise(KIND, applies=lambda name: bool(_read(name)))
def what_is_read_beside_moves_with_its_token(name: str) -> None:
    """It has an effect, with what `requires` names for it; none in padding; and decoding reads it alike."""
    cls = mixer_class(name)
    for argument in _read(name):
        options = dict(cls.requires.get(argument, {}))

        def check(grid: Grid, argument: str = argument, options: dict = options) -> None:
            length, causal = grid[0], can_be_causal(name)
            mixer = perturbed(build(name, grid, causal=causal, **options))
            x, given = tokens(3, length, DIM), _beside(argument, length, 6)
            told = {"argument": argument, "length": length, "options": options}
            with torch.no_grad():
                y = mixer(x, **{argument: given})
                if length == GRIDS[1][-1][0]:
                    require(error(y, mixer(x)) > 0, "It has no effect.", **told)
                for side, mask in sequence_masks(length).items():
                    other = _beside(argument, length, 7)
                    if argument == "embeddings":
                        other = torch.full_like(given, float("nan"))
                    hidden = mask if given.ndim == 2 else mask[..., None]
                    expected = mixer(x, mask=mask, **{argument: given})[mask]
                    got = mixer(x, mask=mask, **{argument: torch.where(hidden, given, other)})[mask]
                    near(got, expected, "It is read in padding.", padding=side, **told)
                    for row in range(3):
                        alone = mixer(x[row, mask[row]][None], **{argument: given[row, mask[row]][None]})[0]
                        whole = mixer(x, mask=mask, **{argument: given})[row, mask[row]]
                        near(whole, alone, "It does not move with its token.", padding=side, **told)
                if not (cls.streams and causal):
                    return
                state, steps = mixer.init_state(3), []
                for t in range(length):
                    y_t, state = mixer.step(x[:, t], state, **{argument: given[:, t]})
                    steps.append(y_t)
                near(torch.stack(steps, 1), y, "`step` reads it otherwise.", **told)
                cut = length // 2
                first, state = mixer.prefill(x[:, :cut], **{argument: given[:, :cut]})
                second, _ = mixer.prefill(x[:, cut:], state=state, **{argument: given[:, cut:]})
                near(torch.cat([first, second], 1), y, "`prefill` reads it otherwise.", **told)

        at_the_smallest(check, GRIDS[1])

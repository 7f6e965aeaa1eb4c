"""What `check` says besides broken promises: class data that could be stronger, and costs beside other mixers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo import Mixer
from mixerzoo.contract.bench import measure
from mixerzoo.contract.hints import flop_growth, hints
from mixerzoo.contract.report import examine, place_of
from mixerzoo.mixers.base import MIXERS
from torch import Tensor, nn

SOURCE = Path(__file__).read_text().splitlines()


class _Base(Mixer):
    """A linear layer, and what a subclass adds to it."""

    axes, source = (1, 2, 3), "a test"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)


class MaskHonoured:
    """The mean of the real tokens."""

    def forward(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        axes = tuple(range(1, x.ndim - 1))
        return self.proj(x + x.sum(axes, keepdim=True) / real.sum(axes, keepdim=True).clamp_min(1))


class Causal:
    """The sum of the past, in sequences."""

    axes = (1,)

    def forward(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        return self.proj(torch.einsum("bnc->bnc", x).cumsum(1))


class Cheaper:
    """The mean, of which it is said that it takes a square of the tokens."""

    complexity = "N^2"

    def forward(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        return self.proj(x + x.mean(tuple(range(1, x.ndim - 1)), keepdim=True))


class Dearer:
    """All pairs of tokens, of which it is said that it takes a pass over them."""

    axes = (1,)

    def forward(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        return self.proj((x @ x.transpose(1, 2)).softmax(-1) @ x)


class Narrower:
    """The mean, of which it is said that it takes images alone."""

    axes = (2,)

    def forward(self: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        return self.proj(x + x.mean(tuple(range(1, x.ndim - 1)), keepdim=True))


SAID = {
    MaskHonoured: "masks = True",
    Causal: 'causal = "always"',
    Cheaper: "its FLOPs grow like N^1.0, less than complexity = 'N^2' says: complexity = 'N'",
    Dearer: "more than complexity = 'N' says: complexity = 'N^2'",
    Narrower: "takes grids of 1 and 3 axes, though it does not say so: axes = (1, 2, 3)",
}


@pytest.fixture
def mixer(request: pytest.FixtureRequest) -> Iterator[str]:
    part = request.param
    type("Hinted", (part, _Base), {"__doc__": part.__doc__}, name="hinted_for_a_test")
    yield "hinted_for_a_test"
    del MIXERS["hinted_for_a_test"]


@pytest.mark.parametrize(("mixer", "said"), SAID.items(), indirect=["mixer"])
def test_stronger_class_data_are_hinted_at(mixer: str, said: str) -> None:
    before = dict(vars(MIXERS[mixer]))
    found = hints(mixer)
    assert len(found) == 1, found
    assert said in found[0]
    assert dict(vars(MIXERS[mixer])) == before  # trying other class data leaves no trace


@pytest.mark.parametrize("name", ["pooling", "attention", "mamba2", "mlp_mixer", "global_filter"])
def test_mixers_that_say_all_get_no_hint(name: str) -> None:
    assert hints(name) == []


def test_growth_is_that_of_the_arithmetic() -> None:
    assert flop_growth("pooling") == pytest.approx(1, abs=0.02)
    assert flop_growth("attention") == pytest.approx(2, abs=0.2)


def test_costs_beside_others() -> None:
    lines = measure("attention", beside=("identity", "mamba2"), grids=((32,), (64,)))
    assert [(line.name, line.grid) for line in lines] == [
        (name, grid) for grid in ((32,), (64,)) for name in ("attention", "identity", "mamba2")
    ]
    by = {(line.name, line.grid[0]): line for line in lines}
    assert all(line.forward > 0 and line.both > 0 for line in lines)
    # keys and values of 64 channels in float32, and a little about each token; a state that does not grow; none at all
    grown = (by["attention", 64].state or 0) - (by["attention", 32].state or 0)
    assert grown == pytest.approx(32 * 2 * 64 * 4, rel=0.05)
    assert by["mamba2", 64].state == by["mamba2", 32].state
    assert by["mamba2", 64].activations == pytest.approx(2 * by["mamba2", 32].activations, rel=0.2)
    assert by["identity", 64].activations == 0


def test_mixers_of_images_are_measured_on_images() -> None:
    lines = measure("global_filter", beside=("attention", "identity"), grids=((4, 4),))
    assert [line.name for line in lines] == ["global_filter", "attention", "identity"]
    assert all(line.state is None for line in lines)


def test_a_place_is_the_line_of_the_method() -> None:
    file, _, line = place_of(Narrower, "forward").rpartition(":")
    assert file.endswith("test_hints_and_costs.py")
    assert "def forward" in SOURCE[int(line) - 1]
    _, _, line = place_of(Narrower).rpartition(":")
    assert "class Narrower" in SOURCE[int(line) - 1]


def test_a_basic_promise_that_breaks_ends_the_trial() -> None:
    class Wrong(Cheaper, _Base, name="wrong_for_a_test"):
        """Loses the tokens."""

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return super().forward(x, mask=mask).mean(1)

    try:
        found = examine("mixer", "wrong_for_a_test")
    finally:
        del MIXERS["wrong_for_a_test"]
    assert [fault.promises for fault in found.faults] == [("shape_and_dtype_are_kept",)]
    assert found.untried > 10
    assert found.broken == 1

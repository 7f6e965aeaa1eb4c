"""A test of the tests: parts with a planted fault are caught by the contract, without a test written for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mixerzoo.contract import BrokenPromise, promises, run
from mixerzoo.mixers.base import MIXERS, Mixer
from mixerzoo.mixers.orders.paths import PATHS
from mixerzoo.mixers.part import states
from mixerzoo.mixers.recurrent.ssm import Mamba
from mixerzoo.mixers.state import map_state
from mixerzoo.models.parts.channel_mixers import CHANNEL_MIXERS, ChannelMixer
from mixerzoo.models.parts.norms import NORMS
from mixerzoo.schema import Parts
from mixerzoo.training.schedules import SCHEDULES
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def broken(kind: str, name: str, only: list[str] | None = None) -> set[str]:
    """The promises that the part breaks. A crash is no catch."""
    results = list(run(kind, [name], only))
    assert not [r for r in results if r.status == "crashed"], results
    return {r.promise for r in results if r.status == "broken"}


# -- streaming mixers


class StateIgnored:
    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        return super().prefill(x, mask=mask)  # type: ignore[misc]


class MaskDropped:
    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        return super().prefill(x, state=state)  # type: ignore[misc]


class StateZeroed:
    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        y, state = super().prefill(x, mask=mask, state=state)  # type: ignore[misc]
        return y, map_state(torch.zeros_like, state)


class DocumentsDropped:
    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask)  # type: ignore[misc]


STREAMING = {
    StateIgnored: "a_sequence_can_be_cut_anywhere",
    MaskDropped: "a_padded_prefill_continues_each_row",
    StateZeroed: "a_sequence_can_be_cut_anywhere",
    DocumentsDropped: "packed_documents_equal_streams",
}
ABOUT_STREAMING = [p.name for p in promises("mixer") if p.check.__module__.endswith("streaming")]


@pytest.fixture
def mixer(request: pytest.FixtureRequest) -> Iterator[str]:
    fault: tuple[type, ...] = () if request.param is None else (request.param,)
    type("Streamed", (*fault, Mamba), {"__doc__": "As `mamba`, but for the fault."}, name="streamed_for_a_test")
    yield "streamed_for_a_test"
    del MIXERS["streamed_for_a_test"]


@pytest.mark.parametrize("mixer", [None], indirect=True)
def test_the_mixer_without_a_fault_keeps_its_promises(mixer: str) -> None:
    assert len(ABOUT_STREAMING) >= 7
    assert broken("mixer", mixer, ABOUT_STREAMING) == set()


@pytest.mark.parametrize(("mixer", "promise"), STREAMING.items(), indirect=["mixer"])
def test_broken_streaming_is_caught(mixer: str, promise: str) -> None:
    assert broken("mixer", mixer, [promise]) == {promise}


def test_the_smallest_example_is_told() -> None:
    class Late(StateIgnored, Mamba, name="late_for_a_test"):
        """Ignores the state."""

    try:
        with pytest.raises(BrokenPromise, match=r'^mixer "late_for_a_test" breaks `a_sequence_can_be_cut') as caught:
            next(p for p in promises("mixer") if p.name == "a_sequence_can_be_cut_anywhere").check("late_for_a_test")
    finally:
        del MIXERS["late_for_a_test"]
    assert (caught.value.example["length"], caught.value.example["cut"]) == (3, 1)


# -- derivatives


class Square(torch.autograd.Function):
    """x^2, differentiable once, and for one sample at a time."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class SecondIsZero(Square):
    """Its gradient is a constant to autograd."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * grad


class SamplesScaled(Square):
    """By itself right; for a batch by `vmap` another number."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return 1.01 * x.square(), in_dims[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


SECOND, EACH = "second_derivatives_are_right_or_refused", "per_sample_gradients_are_right_or_refused"
WHY = {"second derivatives": "once_differentiable", "vmap": "no rule"}


@pytest.mark.parametrize(
    ("function", "refuses", "expected"),
    [
        (None, {}, set()),
        (None, WHY, {SECOND, EACH}),
        (Square, {}, {SECOND, EACH}),
        (Square, WHY, set()),
        (SecondIsZero, {}, {SECOND}),
        (SamplesScaled, {}, {EACH}),
    ],
)
def test_derivatives_that_are_wrong_or_missing(function: Any, refuses: dict[str, str], expected: set[str]) -> None:
    class Squared(Mixer, name="squared_for_a_test"):
        """Squares every token."""

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return x.square() if function is None else function.apply(x)

        def __init__(self, dim: int) -> None:
            super().__init__()

    Squared.refuses = refuses
    try:
        assert broken("mixer", "squared_for_a_test", [SECOND, EACH]) == expected
    finally:
        del MIXERS["squared_for_a_test"]


# -- the other kinds


class TokensMixed(ChannelMixer):
    """A convolution along the tokens, which it does not state."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return self.fc(x) + (0.01 * x.roll(1, 1) if x.ndim > 2 else 0)


class OptionIgnored(ChannelMixer):
    """An option that nothing reads."""

    alternatives = {"ratio": 2.0}

    def __init__(self, dim: int, *, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return self.fc(x)


class MaskMultiplied(ChannelMixer):
    """Mixes tokens and says so, but multiplies padding away: NaN stays."""

    mixes_tokens = True
    masks = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        self.refuse_padding(None, document_ids)
        y = self.fc(x)
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        return y + y.flatten(1, -2).sum(1).view(x.shape[0], *[1] * (x.ndim - 2), -1)


class CentredOverTokens(nn.Module):
    """A layer norm that also takes the mean over the tokens away, which it does not state."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x - x.mean(tuple(range(1, x.ndim - 1)), keepdim=True))


class CentredOverBatch(nn.Module):
    """As before, over the batch in training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x - x.mean(0) if self.training else x)


def one_left_out(base: Tensor) -> list[Tensor]:
    """Raster order, in which the second token stands twice and the last one is missing."""
    path = base.flatten().clone()
    path[2:] = base.flatten()[1:-1]
    return [path[None]]


@states(alternatives={"size": 3})
def size_ignored(base: Tensor, *, size: int = 4) -> list[Tensor]:
    """Raster order with an option that nothing reads."""
    return [base.reshape(1, -1)]


class Scheduled:
    def __init__(self, optimizer: torch.optim.Optimizer, warm_up: Any) -> None:
        self.groups, self.peak = optimizer.param_groups, optimizer.param_groups[0]["lr"]
        self.warm_up, self.calls = warm_up["warmup_t"], 0

    def step_update(self, step: int) -> None:
        self.calls += 1
        rate = self.rate(step) if step >= self.warm_up else self.peak * (step + 1) / self.warm_up
        self.groups[0]["lr"] = rate


class TooHigh(Scheduled):
    def rate(self, step: int) -> float:
        return 1.01 * self.peak


class Counting(Scheduled):
    def rate(self, step: int) -> float:
        return self.peak * 0.99**self.calls


def too_high(optimizer: torch.optim.Optimizer, *, total_steps: int, warm_up: Any) -> Any:
    return TooHigh(optimizer, warm_up)


def counting(optimizer: torch.optim.Optimizer, *, total_steps: int, warm_up: Any) -> Any:
    return Counting(optimizer, warm_up)


FAULTS = [
    ("channel_mixer", CHANNEL_MIXERS, TokensMixed, "tokens_mix_as_stated"),
    ("channel_mixer", CHANNEL_MIXERS, OptionIgnored, "every_option_has_an_effect"),
    ("channel_mixer", CHANNEL_MIXERS, MaskMultiplied, "padding_is_never_read"),
    ("norm", NORMS, CentredOverTokens, "tokens_mix_as_stated"),
    ("norm", NORMS, CentredOverBatch, "samples_mix_as_stated"),
    ("order", PATHS, one_left_out, "every_token_is_visited_once"),
    ("order", PATHS, size_ignored, "every_option_has_an_effect"),
    ("schedule", SCHEDULES, too_high, "rates_stay_between_the_last_and_the_peak"),
    ("schedule", SCHEDULES, counting, "a_rate_depends_on_the_step_alone"),
]


@pytest.mark.parametrize(("kind", "registry", "part", "promise"), FAULTS, ids=[f[2].__name__ for f in FAULTS])
def test_a_planted_fault_is_caught(kind: str, registry: Parts, part: Any, promise: str) -> None:
    registry.register("faulty_for_a_test")(part)
    try:
        results = [r for r in run(kind, ["faulty_for_a_test"]) if r.status != "kept"]
        assert promise in {r.promise for r in results if r.status == "broken"}, results
        assert all(r.example for r in results if r.promise == promise)
    finally:
        del registry.entries["faulty_for_a_test"]

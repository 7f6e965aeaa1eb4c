"""What the contract promises, for every registered mixer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import Grid, Mixer, create_mixer, list_mixers, mixer_class, mixer_options
from mixerzoo.training.cost import measure_flops
from torch import Tensor

DIM = 32
GRIDS: dict[int, Grid] = {1: (12,), 2: (6, 5), 3: (2, 4, 3)}
SQUARE: Grid = (8, 8)
NAMES = list_mixers()
CAUSAL = list_mixers(causal=True)
CASES = [(n, rank) for n in NAMES for rank in mixer_class(n).axes]


def grid_of(name: str, rank: int) -> Grid:
    """The grid on which a mixer is tried: not square, unless the published mixer takes squares alone."""
    return SQUARE if rank == 2 and getattr(mixer_class(name), "square", False) else GRIDS[rank]


def build(name: str, rank: int, *, causal: bool = False, dim: int = DIM, **options: Any) -> Mixer:
    torch.manual_seed(0)
    causal = causal or mixer_class(name).causal == "always"
    return create_mixer(name, dim, grid=grid_of(name, rank), causal=causal, **options).eval()


def tokens(grid: Grid, *, batch: int = 2, dim: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(seed))


def shake(mixer: Mixer) -> Mixer:
    """Random values in place of the initial ones, where zeros would hide a path."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.requires_grad and (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return mixer


@pytest.mark.parametrize(("name", "rank"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shape_dtype_and_gradients(name: str, rank: int, dtype: torch.dtype) -> None:
    mixer = build(name, rank).to(dtype)
    x = tokens(grid_of(name, rank)).to(dtype).requires_grad_()
    y = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    untrained = getattr(type(mixer), "untrained", frozenset())
    for key, parameter in mixer.named_parameters():
        if parameter.requires_grad and not any(key.startswith(u) for u in untrained):
            assert parameter.grad is not None, f"{key} has no gradient"
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_other_width_and_single_sample(name: str) -> None:
    rank = max(mixer_class(name).axes)
    mixer = build(name, rank, dim=48)
    assert mixer(tokens(grid_of(name, rank), batch=1, dim=48)).isfinite().all()


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_autocast_keeps_finite(name: str, rank: int) -> None:
    mixer, x = build(name, rank), tokens(grid_of(name, rank))
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    full = mixer(x)
    assert y.isfinite().all()
    assert (y.float() - full).norm() <= 0.1 * full.norm() + 1e-3


@pytest.mark.parametrize(("name", "rank"), CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_hides_padding_or_is_refused(name: str, rank: int, side: str) -> None:
    mixer = shake(build(name, rank))
    grid = grid_of(name, rank)
    x = tokens(grid)
    mask = torch.ones(2, *grid, dtype=torch.bool)
    pad = slice(0, 2) if side == "left" else slice(-2, None)
    mask[1, ..., pad] = False  # the last axis: columns of an image
    if not mixer.masks:
        with pytest.raises(ConfigError, match="mask"):
            mixer(x, mask=mask)
        return
    other = torch.where(mask.unsqueeze(-1), x, 17 * tokens(grid, seed=9))
    a, b = mixer(x, mask=mask), mixer(other, mask=mask)
    torch.testing.assert_close(a[mask], b[mask], rtol=1e-5, atol=1e-6)
    assert a[mask].isfinite().all()
    if name != "identity" and side == "left":  # a causal mixer does not look to the right anyway
        unmasked = mixer(other)
        assert not torch.allclose(unmasked[mask], b[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_causality_by_gradient(name: str) -> None:
    cls = mixer_class(name)
    if cls.causal == "cannot":
        with pytest.raises(ConfigError, match="cannot be causal"):
            create_mixer(name, DIM, grid=GRIDS[cls.axes[0]], causal=True)
        return
    mixer = shake(build(name, 1, causal=True))
    x = tokens(GRIDS[1]).requires_grad_()
    at = 5
    (grad,) = torch.autograd.grad(mixer(x)[:, at].sum(), x)
    assert grad[:, at + 1 :].abs().max() <= 1e-6 * grad.abs().max(), "the future is seen"  # an FFT rounds
    if name != "identity":
        assert grad[:, :at].abs().max() > 0, "the past is not seen"


@pytest.mark.parametrize("name", list_mixers(causal=True, streams=True))
def test_streaming_equals_parallel(name: str) -> None:
    mixer = shake(build(name, 1, causal=True))
    x = tokens(GRIDS[1])
    with torch.no_grad():
        parallel = mixer(x)
        state = mixer.init_state(2)
        steps = []
        for t in range(x.shape[1]):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), parallel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list_mixers(causal=True, packs=True))
def test_packed_documents_do_not_leak(name: str) -> None:
    mixer = shake(build(name, 1, causal=True))
    x = tokens(GRIDS[1]).requires_grad_()
    document_ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    y = mixer(x, document_ids=document_ids)
    (grad,) = torch.autograd.grad(y[:, 5:].square().sum(), x)
    assert grad[:, :5].abs().max() <= 1e-6 * grad.abs().max()  # sums of decays round
    alone = mixer(x[:, 5:].detach())
    torch.testing.assert_close(y[:, 5:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_document_ids_only_where_declared(name: str) -> None:
    assert ("document_ids" in inspect.signature(mixer_class(name).forward).parameters) == mixer_class(name).packs


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_restorable(name: str) -> None:
    rank = mixer_class(name).axes[-1]
    first = shake(build(name, rank))
    x = tokens(grid_of(name, rank))
    torch.manual_seed(7)
    second = create_mixer(name, DIM, grid=grid_of(name, rank), causal=first.is_causal).eval()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first(x), first(x))
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_another_grid(name: str, rank: int) -> None:
    mixer = shake(build(name, rank))
    grid = (10, 10) if grid_of(name, rank) == SQUARE else tuple(s + 2 for s in grid_of(name, rank))
    if mixer.needs_grid:
        if not mixer.is_causal:
            with pytest.raises(ConfigError, match="resize_grid"):
                mixer(tokens(grid))
        mixer.resize_grid(grid)
    y = mixer(tokens(grid))
    assert y.shape == (2, *grid, DIM)
    assert y.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_break(name: str) -> None:
    rank = mixer_class(name).axes[-1]
    mixer, x = shake(build(name, rank)), tokens(grid_of(name, rank)).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), mixer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


OPTIONS = [(n, o) for n in NAMES for o in mixer_options(n) if o not in mixer_class(n).inert]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_has_an_effect(name: str, option: str) -> None:
    cls = mixer_class(name)
    parameter = mixer_options(name)[option]
    if isinstance(parameter.default, bool) and option not in cls.alternatives:
        value: Any = not parameter.default
    else:
        assert option in cls.alternatives, f"{name}: `alternatives` has no other value for the option {option}"
        value = cls.alternatives[option]
    assert value != parameter.default
    given = dict(getattr(cls, "requires", {}).get(option, {}))
    causal = bool(given.pop("causal", False))
    rank = 1 if causal else cls.axes[-1]
    seen = []
    x = tokens(grid_of(name, rank))
    for options in (given, {**given, option: value}):
        mixer = shake(build(name, rank, causal=causal, **options))
        mixer.train()
        torch.manual_seed(5)
        with torch.no_grad():
            y = mixer(x)
        seen.append((y, sum(p.numel() for p in mixer.parameters()), measure_flops(mixer, x)))
    (y0, count0, cost0), (y1, count1, cost1) = seen
    assert count0 != count1 or cost0 != cost1 or not torch.equal(y0, y1), "no effect"


@pytest.mark.parametrize("name", NAMES)
def test_class_data(name: str) -> None:
    cls = mixer_class(name)
    rank = cls.axes[-1]
    mixer = build(name, rank)
    names = {n for n, _ in mixer.named_parameters()}
    assert mixer.no_weight_decay() <= names
    assert {n for n, p in mixer.named_parameters() if p.ndim <= 1} <= mixer.no_weight_decay()
    assert cls.causal in ("can", "cannot", "always")
    assert ("causal" in inspect.signature(cls.__init__).parameters) == (cls.causal == "can")
    assert cls.source, "where does it come from?"
    assert cls.__doc__
    assert set(cls.alternatives) <= set(mixer_options(name))
    if cls.needs_grid:
        with pytest.raises(ConfigError, match="grid"):
            create_mixer(name, DIM, causal=cls.causal == "always")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_inductor(name: str) -> None:
    rank = mixer_class(name).axes[-1]
    mixer, x = build(name, rank), tokens(grid_of(name, rank))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True)(x), mixer(x), rtol=1e-3, atol=1e-4)

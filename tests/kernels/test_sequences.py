"""Packed sequences by offsets, in every scan and convolution: states of their own, empty ones, and either direction."""

from __future__ import annotations

import itertools

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import causal_conv1d, delta_rule, gla, selective_scan, ssd
from mixerzoo.kernels.common.packing import count_slots, in_chunks, slot_owners
from mixerzoo.tests.kernels.scans import scan_inputs
from mixerzoo.tests.kernels.utils import check_reference, compare, skewed
from torch import Tensor

OPS = {"ssd": ssd, "gla": gla, "delta_rule": delta_rule, "selective_scan": selective_scan, "conv": causal_conv1d}
# empty ones at both ends and inside, of one token, of more than a block of 64, of just 16, and one more
ENDS = [0, 0, 1, 6, 76, 76, 92, 93, 101, 101]
LONG = [0, 3, 67, 67, 195, 200]


def inputs(op: str, ends: list[int], *, keys: int = 5, size: int = 6, dtype: torch.dtype = torch.float32, **options):
    """Inputs of one row of tokens, with an initial state for every sequence."""
    length, rows = ends[-1], len(ends) - 1
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if op in ("ssd", "gla", "delta_rule"):
        made = scan_inputs(op, 1, length, 2, keys, size, initial=False, dtype=dtype, **options)
        made["initial_state"] = normal(rows, 2, keys, size)
    elif op == "conv":
        made = {"x": normal(1, length, size), "weight": normal(size, 4), "bias": normal(size)}
        made |= {"initial_state": normal(rows, 3, size)}
        made = {name: x.to(dtype) for name, x in made.items()}
    else:
        made = {"u": normal(1, length, 4), "delta": normal(1, length, 4).abs(), "B": normal(1, length, 2, 3)}
        made |= {"C": normal(1, length, 2, 3), "z": normal(1, length, 4)}
        made = {name: x.to(dtype) for name, x in made.items()}
        made |= {"A": -normal(4, 3).exp(), "D": normal(4), "delta_bias": normal(4), "initial_state": normal(rows, 4, 3)}
    return made | {"cu_seqlens": torch.tensor(ends)}


def options(op: str, **more):
    extra = {"conv": {"activation": "silu"}, "selective_scan": {"delta_softplus": True}}
    return {"return_final_state": True} | extra.get(op, {}) | more


def alone(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inputs of one sequence."""
    start, end = given["cu_seqlens"].tolist()[row : row + 2]
    length = int(given["cu_seqlens"][-1])
    found = {n: x[:, start:end] if x.ndim > 1 and x.shape[:2] == (1, length) else x for n, x in given.items()}
    return found | {"initial_state": given["initial_state"][row : row + 1], "cu_seqlens": None}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_sequence_is_as_alone(op, reverse):
    given = inputs(op, ENDS)
    y, states = OPS[op](**given, **options(op, reverse=reverse), backend="reference")
    for row, (start, end) in enumerate(itertools.pairwise(ENDS)):
        own, state = OPS[op](**alone(given, row), **options(op, reverse=reverse), backend="reference")
        assert torch.equal(y[:, start:end], own)
        assert torch.equal(states[row : row + 1], state)
        if start == end:
            assert torch.equal(state[0], given["initial_state"][row])


@pytest.mark.parametrize("op", OPS)
def test_reverse_is_the_mirror_image(op):
    """By hand: the last token first, and the outputs back in their order."""
    given = inputs(op, [0, 9]) | {"cu_seqlens": None}
    y, state = OPS[op](**given, **options(op, reverse=True), backend="reference")
    mirrored = {n: x.flip(1) if x is not None and x.ndim > 1 and x.shape[:2] == (1, 9) else x for n, x in given.items()}
    y_mirrored, state_mirrored = OPS[op](**mirrored, **options(op), backend="reference")
    assert torch.equal(y, y_mirrored.flip(1))
    assert torch.equal(state, state_mirrored)


@pytest.mark.parametrize("op", OPS)
def test_reference_gradients(op):
    given = inputs(op, [0, 0, 2, 5, 5], keys=2, size=2)
    check_reference(OPS[op], given, **options(op))


@pytest.mark.parametrize("ends", [ENDS, LONG, [0, 5]])
@pytest.mark.parametrize("op", OPS)
def test_eager(op, ends):
    compare(OPS[op], inputs(op, ends), "eager", **options(op, reverse=ends == LONG))


@pytest.mark.parametrize("op", OPS)
def test_eager_without_initial_states(op):
    given = inputs(op, ENDS, dtype=torch.bfloat16)
    del given["initial_state"]
    compare(OPS[op], given, "eager", **options(op))


@pytest.mark.parametrize("op", OPS)
def test_triton(op):
    compare(OPS[op], inputs(op, ENDS), "triton", **options(op))


@pytest.mark.parametrize("op", OPS)
def test_triton_without_initial_states(op):
    given = inputs(op, [0, 3, 3, 20], dtype=torch.bfloat16)
    del given["initial_state"]
    given = {name: skewed(x) if x.ndim == 4 else x for name, x in given.items()}
    compare(OPS[op], given, "triton", **options(op))


def test_triton_spans(monkeypatch):
    """Programs that start in the middle of a sequence, from stored states."""
    from mixerzoo.kernels.ssd import triton as kernels

    monkeypatch.setattr(kernels, "span_of", lambda *_: 1)
    compare(ssd, inputs("ssd", ENDS), "triton", **options("ssd"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [[0, 15, 100, 300], [0, 63, 63, 64], [0, 122, 229]])
@pytest.mark.parametrize("op", OPS)
def test_triton_grid(op, ends, dtype):
    compare(OPS[op], inputs(op, ends, keys=20, size=18, dtype=dtype), "triton", **options(op, reverse=ends[1] == 15))


@pytest.mark.parametrize("op", OPS)
def test_compiles(op):
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    given = inputs(op, ENDS)
    found = compiled(**given, **options(op), backend="eager")
    expected = OPS[op](**given, **options(op), backend="eager")
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_slots(size):
    """Every token has one place, in a slot of its own sequence, and every sequence has a slot."""
    cu = torch.tensor(ENDS)
    slots = count_slots(cu, 1, ENDS[-1], size)
    owner = slot_owners(cu, ENDS[-1], size)
    chunks = in_chunks(cu, ENDS[-1], size)
    assert slots == len(owner) == ENDS[-1] // size + len(ENDS) - 1
    assert chunks.back.unique().numel() == ENDS[-1]
    assert chunks.real.sum() == ENDS[-1]
    assert torch.equal(chunks.take[chunks.back], torch.arange(ENDS[-1]))
    for row, (start, end) in enumerate(itertools.pairwise(ENDS)):
        assert (owner[chunks.back[start:end] // size] == row).all()
        assert chunks.opens[owner == row].tolist() == [True] + [False] * int((owner == row).sum() - 1)
        assert owner[chunks.last[row]] == row


@pytest.mark.parametrize("op", OPS)
def test_mistakes_are_explained(op):
    given = inputs(op, [0, 4, 10])

    def fails(match: str, **change):
        with pytest.raises(ConfigError, match=match):
            OPS[op](**given | change, **options(op))

    fails(r"cu_seqlens=\[0, 4, 9\] does not rise from 0 to the 10 tokens", cu_seqlens=torch.tensor([0, 4, 9]))
    fails(r"does not rise", cu_seqlens=torch.tensor([0, 12, 10]))
    fails(r"offsets \(S \+ 1,\) in int32 or int64, not float32 \(3,\)", cu_seqlens=torch.tensor([0.0, 4.0, 10.0]))
    fails("exclude each other", document_ids=torch.zeros(1, 10, dtype=torch.int64))
    fails(r"initial_state has shape \(2, .*expected \(3, ", cu_seqlens=torch.tensor([0, 4, 4, 10]))
    first = next(iter(given))
    with pytest.raises(ConfigError, match="the inputs have 2: join them"):
        OPS[op](**given | {n: torch.cat([x, x]) for n, x in given.items() if n == first or x.shape[:2] == (1, 10)})

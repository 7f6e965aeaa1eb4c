"""causal_conv1d and its step: against torch's convolution, and every path against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import causal_conv1d, causal_conv1d_step
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, error, mutated, run, skewed
from torch import Tensor

OPTIONS = {"activation": "silu", "return_final_state": True}


def inputs(
    batch: int,
    length: int,
    channels: int,
    taps: int,
    dtype: torch.dtype = torch.float32,
    *,
    full: bool = True,
    documents: bool = False,
) -> dict[str, Tensor | None]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, length, channels), "weight": (channels, taps)}
    if full:
        shapes |= {"bias": (channels,), "initial_state": (batch, taps - 1, channels)}
    found: dict[str, Tensor | None] = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    if documents:
        ids = torch.randint(0, 3, (batch, length), generator=generator)
        found["document_ids"] = ids.where(torch.rand(batch, length, generator=generator) < 0.4, torch.zeros_like(ids))
    return found


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_it_is_a_depthwise_convolution(backend):
    given = inputs(2, 9, 5, 4)
    row = torch.cat([given["initial_state"], given["x"]], 1).mT
    expected = F.silu(F.conv1d(row, given["weight"][:, None], given["bias"], groups=5)).mT
    y, state = causal_conv1d(**given, **OPTIONS, backend=backend)
    assert error(y, expected) < 1e-6
    assert torch.equal(state, given["x"][:, -3:])


def test_reference_gradients():
    check_reference(causal_conv1d, inputs(2, 5, 2, 3, documents=True), **OPTIONS)
    check_reference(causal_conv1d, inputs(1, 2, 2, 4, full=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2, 41, 5, 4), (1, 1, 3, 4), (2, 2, 4, 7), (1, 9, 8, 1), (1, 70, 1100, 2)])
def test_eager(size, dtype):
    compare(causal_conv1d, inputs(*size, dtype, documents=True), "eager", **OPTIONS)
    compare(causal_conv1d, inputs(*size, dtype, full=False), "eager")


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_empty_sequence(backend):
    given = inputs(2, 0, 3, 4, documents=True)
    found = run(causal_conv1d, given, backend=backend, **OPTIONS)
    assert found["output 0"].shape == (2, 0, 3)
    assert torch.equal(found["output 1"], given["initial_state"])
    assert not found["gradient of weight"].any()


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_documents_are_separate_sequences(backend):
    given = inputs(1, 12, 4, 4, full=False)
    ids = torch.tensor([[3] * 5 + [1] + [3] * 6])
    packed, state = causal_conv1d(**given, document_ids=ids, return_final_state=True, backend=backend)
    parts = [causal_conv1d(given["x"][:, a:b], given["weight"], backend=backend) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert error(packed, torch.cat(parts, 1)) < 1e-6
    assert torch.equal(state, given["x"][:, -3:])
    short = causal_conv1d(
        given["x"][:, :6], given["weight"], document_ids=ids[:, :6], return_final_state=True, backend=backend
    )[1]
    assert torch.equal(short, torch.cat([torch.zeros(1, 2, 4), given["x"][:, 5:6]], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(dtype):
    compare(causal_conv1d, inputs(1, 41, 5, 4, dtype, documents=True), "triton", **OPTIONS)  # two spans


def test_triton_without_options_and_with_strides():
    compare(causal_conv1d, inputs(2, 7, 3, 2, full=False), "triton")
    given = {k: skewed(v) for k, v in inputs(2, 5, 3, 3, torch.float16).items()}
    compare(causal_conv1d, given, "triton", **OPTIONS)
    compare(causal_conv1d, inputs(1, 2, 4, 1), "triton", **OPTIONS)
    compare(causal_conv1d, inputs(1, 2, 4, 6, documents=True), "triton", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("size", [(2, 63, 130, 4), (1, 100, 41, 3), (3, 41, 7, 2), (2, 33, 260, 1)])
def test_triton_grid(size, documents, dtype):
    for full in (True, False):
        compare(causal_conv1d, inputs(*size, dtype, full=full, documents=documents), "triton", **OPTIONS)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_same_bits_every_time(backend):
    first, second = (run(causal_conv1d, inputs(1, 9, 5, 3), backend=backend, **OPTIONS) for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_opcheck():
    from mixerzoo.kernels.causal_conv1d import eager, triton

    given = {k: v.requires_grad_() for k, v in inputs(1, 6, 3, 3).items()}
    x, weight, bias, state = (given[k] for k in ("x", "weight", "bias", "initial_state"))
    row = torch.cat([state, x], 1).detach().requires_grad_()
    torch.library.opcheck(eager.forward_op.op, (row, weight.T.detach().contiguous().requires_grad_(), bias, None, True))
    torch.library.opcheck(triton.forward_op.op, (x, weight, bias, state, None, None, True))
    torch.library.opcheck(triton.step_op.op, (x[:, 0].detach(), weight.detach(), bias.detach(), state.detach(), True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_without_graph_break(backend):
    given = inputs(1, 6, 3, 3, documents=True)

    def function(**tensors):
        return causal_conv1d(**tensors, **OPTIONS, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = run(function, given), run(compiled, given)
    assert all(error(found[k], v) < 1e-6 for k, v in expected.items())


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_steps_equal_the_convolution(backend, taps):
    given = inputs(2, 6, 5, taps)
    y, last = causal_conv1d(**given, **OPTIONS, backend="reference")
    state, rows = given["initial_state"], []
    for t in range(6):
        row, state = causal_conv1d_step(
            given["x"][:, t], given["weight"], given["bias"], state, activation="silu", backend=backend
        )
        rows.append(row)
    assert error(torch.stack(rows, 1), y) < 1e-6
    assert torch.equal(state, last)


PADDED = torch.tensor([[-1, -1, 4, 4, 4, 4, 4, -1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
def test_padding_is_seen_by_nobody(taps, backend):
    """Tokens of a negative number give 0 and take nothing, whatever they hold; what is between them is as alone."""
    given = inputs(2, 12, 5, taps)
    given["x"][0, PADDED[0] < 0] = torch.nan
    found = run(causal_conv1d, given | {"document_ids": PADDED}, backend=backend, **OPTIONS)
    y, state = found["output 0"], found["output 1"]
    assert not y[PADDED < 0].any()
    assert not state[0].any()
    for start, end in ((2, 7), (8, 10)):
        alone = causal_conv1d(given["x"][:1, start:end], given["weight"], given["bias"], activation="silu")
        assert error(y[:1, start:end], alone) < 1e-6
    assert not found["gradient of x"][PADDED < 0].any()
    for name in ("x", "weight", "bias", "initial_state"):
        assert found[f"gradient of {name}"].isfinite().all()
    clean = given | {"x": given["x"].nan_to_num(0.0)}
    again = run(causal_conv1d, clean | {"document_ids": PADDED}, backend="reference", **OPTIONS)
    assert all(error(found[name], again[name]) < 1e-5 for name in found)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
@pytest.mark.parametrize(("tokens", "taps"), [(1, 4), (4, 2), (5, 3), (2, 4), (3, 1)])
def test_several_tokens_in_a_step(tokens, taps, backend):
    given = inputs(2, tokens, 5, taps)
    rest = given["weight"], given["bias"]
    y, state = causal_conv1d_step(given["x"], *rest, given["initial_state"], activation="silu", backend=backend)
    one = given["initial_state"]
    for t in range(tokens):
        y_t, one = causal_conv1d_step(given["x"][:, t], *rest, one, activation="silu", backend=backend)
        assert error(y[:, t], y_t) < 1e-6
    assert torch.equal(state, one)


def test_mistakes_are_explained():
    given = inputs(1, 6, 3, 3)
    with pytest.raises(ConfigError, match=r'"sillu" is not known. Did you mean "silu"\?'):
        causal_conv1d(**given, activation="sillu")
    with pytest.raises(ConfigError, match=r"initial_state has shape \(1, 3, 3\); expected \(1, 2, 3\)"):
        causal_conv1d(**(given | {"initial_state": torch.zeros(1, 3, 3)}))
    x = given["x"][:, 0].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        causal_conv1d_step(x, given["weight"], None, given["initial_state"], backend="triton")


MUTANTS = {
    "a mask off by one": ("mask=real & (done < length)", "mask=real & (done < length - 1)"),
    "a missing accumulation": ("        y += term\n", "        y = term\n"),
    "a wrong stride": ("tl.store(y_ptr + (origin + t) * channels", "tl.store(y_ptr + (origin + t) * K"),
    "taps in the wrong order": ("w[K - 1 - k] * ds[k]", "w[k] * ds[k]"),
    "a seam that is counted twice": ("        if i < T:", "        if i < T + K:"),
    "a boundary that is ignored": (
        "tl.where(docs[k] == docs[0], term, 0.0)",
        "tl.where(docs[k] == docs[k], term, 0.0)",
    ),
    "a state that is read late": ("(row * (K - 1) + t + (K - 1))", "(row * (K - 1) + t + (K - 2))"),
    "sums of one block of rows only": ("total += tl.load(", "total = tl.load("),
}


def _check(rows: bool) -> None:
    """Two spans; or, for the sum over blocks of 16 rows, 17 rows of the batch."""
    given = inputs(17, 1, 2, 2) if rows else inputs(1, 34, 5, 3, documents=True)
    compare(causal_conv1d, given, "triton", **OPTIONS)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_kernels_are_caught(mutant, tmp_path):
    with mutated("causal_conv1d", *MUTANTS[mutant], tmp_path):
        assert not agrees(lambda: _check("rows" in mutant))


@pytest.mark.parametrize("rows", [False, True])
def test_the_unbroken_kernel_passes_the_same_check(rows):
    _check(rows)

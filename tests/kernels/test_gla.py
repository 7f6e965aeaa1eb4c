"""`gla`: closed form, golden values, eager and Triton against the reference, and broken kernels."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import gla, gla_step, ssd
from mixerzoo.tests.kernels.scans import check_golden_scan, scan_inputs
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated
from mixerzoo.tests.utils import load_golden, relative_error

BACKENDS = ("eager", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_decays_are_ssd(backend):
    x = scan_inputs("ssd", 2, 11, 2, 3, 4)
    x.pop("beta")
    wide = {**x, "g": x["g"][..., None].expand(-1, -1, -1, 3)}
    expected = ssd(**x, scale=3**-0.5, backend="reference")
    assert relative_error(gla(**wide, backend=backend), expected) < 1e-5


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_golden_fla(backend):
    golden = load_golden("fla_gla")

    def run(q, k, v, gk, initial_state=None):
        scale = golden.kwargs["scale"]
        o, state = gla(q, k, v, gk, scale=scale, initial_state=initial_state, return_final_state=True, backend=backend)
        return {"o": o, "state": state}

    inputs = golden.group("input")
    check_golden_scan(
        run, inputs, golden,
        {"o": "output.o", "state": "output.final_state"},
        {"o": "cotangent.o", "state": "cotangent.final_state"},
        {n: f"grad.input.{n}" for n in inputs},
    )  # fmt: skip


def test_reference_gradients():
    check_reference(gla, scan_inputs("gla", 1, 6, 1, 2, 3, documents=True), return_final_state=True)


@pytest.mark.parametrize("length", [1, 41, 63, 100, 150])
def test_eager(length):
    inputs = scan_inputs("gla", 2, length, 2, 5, 6, documents=length > 50, strided=length == 41)
    compare(gla, inputs, "eager", return_final_state=True)


@pytest.mark.parametrize("decay", [1e-3, 20.0])
def test_eager_weak_and_strong_decay(decay):
    compare(gla, scan_inputs("gla", 1, 70, 2, 5, 6, decay=decay), "eager", return_final_state=True)


def test_eager_everything_decays_at_once():
    """-20 in every step: exp(-G) would overflow within 5 tokens."""
    inputs = scan_inputs("gla", 1, 70, 1, 3, 4)
    compare(gla, {**inputs, "g": torch.full_like(inputs["g"], -20.0)}, "eager", return_final_state=True)


@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
def test_empty(backend):
    for batch, length in ((0, 5), (2, 0)):
        inputs = scan_inputs("gla", batch, length, 2, 3, 4)
        y, state = gla(**inputs, return_final_state=True, backend=backend)
        assert y.shape == (batch, length, 2, 4)
        assert torch.equal(state, inputs["initial_state"])


def test_steps_equal_scan():
    x = scan_inputs("gla", 2, 9, 2, 3, 4)
    state = x.pop("initial_state")
    y, last = gla(**x, initial_state=state, return_final_state=True, backend="eager")
    for t in range(9):
        y_t, state = gla_step(*(x[n][:, t] for n in ("q", "k", "v", "g")), state, backend="eager")
        assert relative_error(y_t, y[:, t]) < 1e-5
    assert relative_error(state, last) < 1e-5


def test_compiles():
    x = scan_inputs("gla", 1, 70, 1, 3, 4, documents=True)
    compiled = torch.compile(gla, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**x, backend="eager"), gla(**x, backend="eager")) < 1e-6
    x = scan_inputs("gla", 1, 10, 1, 3, 4)
    assert relative_error(compiled(**x, backend="triton"), gla(**x, backend="reference")) < 1e-5


def test_messages():
    x = scan_inputs("gla", 1, 4, 2, 3, 4)
    with pytest.raises(ConfigError, match=r"g has shape \(1, 4, 2, 1\)"):
        gla(**{**x, "g": x["g"][..., :1]})


# -- Triton, interpreted


def test_triton_small():
    inputs = scan_inputs("gla", 1, 41, 1, 5, 6, documents=True, strided=True)
    compare(gla, inputs, "triton", return_final_state=True)


def test_triton_bfloat16():
    inputs = scan_inputs("gla", 1, 33, 1, 16, 5, dtype=torch.bfloat16)
    compare(gla, inputs, "triton", return_final_state=True)


def test_triton_strong_decay():
    compare(gla, scan_inputs("gla", 1, 20, 1, 5, 6, decay=20.0, initial=False), "triton")


def test_opcheck():
    from mixerzoo.kernels.gla.triton import _forward_op

    x = scan_inputs("gla", 1, 5, 1, 3, 4)
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v", "g")]
    torch.library.opcheck(_forward_op.op, (*leaves, 0.5, x["initial_state"].requires_grad_(), None, None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "keys", "size"),
    [(2, 63, 2, 16, 16), (1, 41, 1, 64, 70), (1, 100, 1, 70, 16), (1, 150, 2, 20, 5), (1, 1, 1, 5, 6)],
)
def test_triton_grid(batch, length, heads, keys, size, documents, dtype):
    inputs = scan_inputs("gla", batch, length, heads, keys, size, documents=documents, dtype=dtype)
    compare(gla, inputs, "triton", return_final_state=True)


MUTANTS = [
    ("same & (row[:, None] < row[None, :])", "same & (row[:, None] <= row[None, :])"),
    ("half[:, None] == half[None, :] + 1", "half[:, None] == half[None, :]"),
    ("scores += tl.where(row[:, None] == row[None, :], same[:, None], 0.0)", "scores += 0.0"),
    ("dg_tile += tl.cumsum(arrived, 0, reverse=True)", "dg_tile += tl.cumsum(arrived, 0)"),
    ("dq + place, heads * K", "dq + place, K"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    inputs = scan_inputs("gla", 1, 5, 2, 3, 4)

    def check():
        compare(gla, inputs, "triton", return_final_state=True)

    with mutated("gla", old, new, tmp_path):
        assert not agrees(check)

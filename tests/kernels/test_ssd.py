"""`ssd`: closed forms, golden values, eager and Triton against the reference, and broken kernels."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import ssd, ssd_step
from mixerzoo.kernels.common.chunking import carry_states
from mixerzoo.tests.kernels.scans import RESETS, check_golden_scan, scan_inputs, with_resets
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated
from mixerzoo.tests.utils import load_golden, relative_error

BACKENDS = ("eager", "reference")


def test_closed_form():
    """Without decay it is causal linear attention; with a constant decay, attention under powers of it."""
    x = scan_inputs("ssd", 2, 5, 2, 3, 4, gates=False, initial=False, dtype=torch.float64)
    scores = torch.einsum("bthk,bshk->bhts", x["q"], x["k"])
    for decay in (None, 0.7):
        power = torch.arange(5)[:, None] - torch.arange(5)
        weights = torch.ones(5, 5).tril() if decay is None else (decay ** power.clamp_min(0)).tril()
        expected = 3 * torch.einsum("bhts,bshv->bthv", scores * weights, x["v"])
        g = None if decay is None else torch.full((2, 5, 2), decay, dtype=torch.float64).log()
        for backend in BACKENDS:
            assert relative_error(ssd(**x, g=g, scale=3.0, backend=backend), expected) < 1e-6


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_golden_mamba2_minimal(backend):
    golden = load_golden("mamba2_ssd_minimal")

    def run(X, A, B, C, initial_states):
        state = initial_states[:, 0].transpose(-1, -2)
        y, state = ssd(C, B, X, A, initial_state=state, return_final_state=True, backend=backend)
        return {"Y": y, "final_state": state.transpose(-1, -2)}

    inputs = {n: golden[f"input.{n}"] for n in ("X", "A", "B", "C", "initial_states")}
    check_golden_scan(
        run, inputs, golden,
        {"Y": "output.Y", "final_state": "output.final_state"},
        {"Y": "cotangent.Y", "final_state": "cotangent.final_state"},
        {n: f"grad.input.{n}" for n in inputs},
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_mamba2_chunk_scan(backend):
    golden = load_golden("mamba2_ssd_chunk_scan")

    def run(x, dt, B, C, A, z=None, D=None, dt_bias=None):
        dt = dt if dt_bias is None else dt + dt_bias
        dt = torch.nn.functional.softplus(dt) if golden.kwargs["dt_softplus"] else dt
        y = ssd(C, B, x, dt * A, beta=dt, backend=backend)
        y = y if D is None else y + D[..., None] * x if D.dim() == 1 else y + D * x
        return {"y": y if z is None else y * torch.nn.functional.silu(z)}

    inputs = golden.group("input")
    check_golden_scan(
        run, inputs, golden, {"y": "output"}, {"y": "cotangent"}, {n: f"grad.input.{n}" for n in inputs}
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["simple_gla", "lightning_attn", "linear_attn"])
def test_golden_fla(name, backend):
    golden = load_golden(f"fla_{name}")

    def run(q, k, v, g=None, initial_state=None):
        if name == "lightning_attn":
            g = golden["output.g_gamma"].expand(*v.shape[:3])
        scale = golden.kwargs["scale"]
        o, state = ssd(q, k, v, g, scale=scale, initial_state=initial_state, return_final_state=True, backend=backend)
        return {"o": o, "state": state}

    inputs = golden.group("input")
    check_golden_scan(
        run, inputs, golden,
        {"o": "output.o", "state": "output.final_state"},
        {"o": "cotangent.o", "state": "cotangent.final_state"},
        {n: f"grad.input.{n}" for n in inputs},
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_fla_retention(backend):
    golden = load_golden("fla_retention")

    def run(q, k, v):
        g = (1 - 2.0 ** (-5 - torch.arange(q.shape[1]))).log().expand(q.shape[0], q.shape[2], -1)
        time_first = (x.transpose(1, 2) for x in (q, k, v))
        return {"o": ssd(*time_first, g, scale=golden.kwargs["scale"], backend=backend).transpose(1, 2)}

    inputs = golden.group("input")
    check_golden_scan(
        run, inputs, golden, {"o": "output.o"}, {"o": "cotangent.o"}, {n: f"grad.input.{n}" for n in inputs}
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_fla_linear_attn_normalized(backend):
    """The denominator is one more column of values, all ones."""
    golden = load_golden("fla_linear_attn_normalized")

    def run(q, k, v):
        wide = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, state = ssd(q, k, wide, scale=golden.kwargs["scale"], return_final_state=True, backend=backend)
        return {"o": o[..., :-1] / (o[..., -1:] + 1e-10), "state": state[..., :-1], "z": state[..., -1][:, None]}

    inputs = golden.group("input")
    check_golden_scan(
        run, inputs, golden,
        {"o": "output.o", "state": "output.final_state", "z": "output.final_z"},
        {"o": "cotangent.o", "state": "cotangent.final_state"},
        {n: f"grad.input.{n}" for n in inputs},
    )  # fmt: skip


def test_reference_gradients():
    check_reference(ssd, scan_inputs("ssd", 1, 6, 2, 2, 3, groups=1, documents=True), return_final_state=True)


@pytest.mark.parametrize("length", [1, 41, 63, 100, 150])
def test_eager(length):
    inputs = scan_inputs("ssd", 2, length, 4, 5, 6, groups=2, documents=length > 50)
    compare(ssd, inputs, "eager", return_final_state=True)


def test_eager_variants():
    compare(ssd, scan_inputs("ssd", 1, 70, 2, 5, 6, gates=False, initial=False, strided=True), "eager")
    compare(ssd, scan_inputs("ssd", 1, 63, 2, 5, 6, decay=20.0), "eager", tolerance=3e-6)
    compare(ssd, scan_inputs("ssd", 2, 70, 2, 5, 6, dtype=torch.bfloat16), "eager", return_final_state=True)


@pytest.mark.parametrize("kind", RESETS)
def test_eager_resets(kind):
    """Strong decays among mild ones: a difference of sums in one number is off by 2e-3, or not a number."""
    inputs = with_resets(scan_inputs("ssd", 1, 130, 2, 5, 6, decay=0.1), kind)
    compare(ssd, inputs, "eager", tolerance=3e-6, return_final_state=True)


def test_states_are_carried_in_two_levels():
    """Past 64 chunks the loop over them is split."""
    update, decay, initial = torch.randn(2, 70, 3), torch.rand(2, 70, 1), torch.randn(2, 3)
    states, last = carry_states(update, decay, initial)
    state = initial
    for i in range(70):
        assert relative_error(states[:, i], state) < 1e-5
        state = decay[:, i] * state + update[:, i]
    assert relative_error(last, state) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
def test_empty(backend):
    for batch, length in ((0, 5), (2, 0)):
        inputs = scan_inputs("ssd", batch, length, 2, 3, 4)
        y, state = ssd(**inputs, return_final_state=True, backend=backend)
        assert y.shape == (batch, length, 2, 4)
        assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_steps_equal_scan(backend):
    x = scan_inputs("ssd", 2, 9, 4, 3, 5, groups=2)
    state = x.pop("initial_state")
    y, last = ssd(**x, initial_state=state, scale=0.5, return_final_state=True, backend=backend)
    before = state.clone()
    for t in range(9):
        q, k, v, g, beta = (x[n][:, t] for n in ("q", "k", "v", "g", "beta"))
        y_t, state = ssd_step(q, k, v, g, state, beta_t=beta, scale=0.5, backend=backend)
        assert relative_error(y_t, y[:, t]) < 1e-5
    assert relative_error(state, last) < 1e-5
    assert not torch.equal(before, state)


def test_documents_do_not_mix():
    """The packed result equals that of the documents one by one; the first continues the initial state."""
    x = scan_inputs("ssd", 1, 70, 2, 3, 4)
    ids = torch.tensor([0] * 20 + [1] * 47 + [0] * 3)[None]
    y = ssd(**x, document_ids=ids, backend="eager")
    for start, end in ((0, 20), (20, 67), (67, 70)):
        part = {n: v[:, start:end] for n, v in x.items() if n != "initial_state"}
        alone = ssd(**part, initial_state=x["initial_state"] if start == 0 else None, backend="eager")
        assert relative_error(alone, y[:, start:end]) < 1e-5


def test_compiles():
    x = scan_inputs("ssd", 1, 70, 2, 3, 4, documents=True)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**x, backend="eager"), ssd(**x, backend="eager")) < 1e-6
    x = scan_inputs("ssd", 1, 20, 1, 3, 4)
    assert relative_error(compiled(**x, backend="triton"), ssd(**x, backend="reference")) < 1e-5


def test_messages():
    x = scan_inputs("ssd", 1, 4, 3, 2, 2, groups=2, gates=False, initial=False)
    with pytest.raises(ConfigError, match="3 heads of v are not divisible into the 2 groups"):
        ssd(**x)
    x = scan_inputs("ssd", 1, 4, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"g has shape \(1, 4, 1\)"):
        ssd(**{**x, "g": x["g"][..., :1]})
    with pytest.raises(ConfigError, match="float64"):
        ssd(**{n: v.double() for n, v in x.items()}, backend="triton")


# -- Triton, interpreted


@pytest.mark.parametrize("kind", RESETS)
def test_triton_resets(kind):
    inputs = with_resets(scan_inputs("ssd", 1, 41, 2, 5, 6, groups=1, decay=0.1), kind)
    compare(ssd, inputs, "triton", tolerance=3e-6, return_final_state=True)


def test_triton_small():
    inputs = scan_inputs("ssd", 1, 41, 4, 5, 6, groups=2, documents=True, strided=True)
    compare(ssd, inputs, "triton", return_final_state=True)


def test_triton_chunks():
    inputs = scan_inputs("ssd", 1, 100, 1, 5, 20, documents=True)
    compare(ssd, inputs, "triton", return_final_state=True)


def test_triton_bfloat16():
    inputs = scan_inputs("ssd", 1, 63, 1, 16, 5, dtype=torch.bfloat16)
    compare(ssd, inputs, "triton", return_final_state=True)


def test_triton_split():
    """Keys of more than one block: products are split, and gradients of keys summed in transposed tiles."""
    inputs = scan_inputs("ssd", 1, 21, 2, 20, 18, groups=1, documents=True)
    compare(ssd, inputs, "triton", return_final_state=True)


def test_triton_plain():
    compare(ssd, scan_inputs("ssd", 1, 1, 1, 3, 4, gates=False, initial=False), "triton")


def test_triton_spans(monkeypatch):
    """Programs that start in the middle of a sequence, from stored states."""
    from mixerzoo.kernels.ssd import triton as kernels

    monkeypatch.setattr(kernels, "span_of", lambda *_: 1)
    inputs = scan_inputs("ssd", 1, 150, 1, 4, 4)
    with torch.no_grad():
        y, state = ssd(**inputs, return_final_state=True, backend="triton")
        y2, state2 = ssd(**inputs, return_final_state=True, backend="reference")
    assert relative_error(y, y2) < 1e-5
    assert relative_error(state, state2) < 1e-5


def test_opcheck():
    from mixerzoo.kernels.ssd.triton import _forward_op

    x = scan_inputs("ssd", 1, 20, 1, 3, 4, dtype=torch.float32)
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v", "g", "beta")]
    torch.library.opcheck(_forward_op.op, (*leaves, 0.5, x["initial_state"].requires_grad_(), None, None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "groups", "heads", "keys", "size"),
    [(2, 63, 2, 2, 16, 16), (1, 41, 1, 1, 64, 70), (1, 100, 1, 2, 70, 16), (2, 150, 2, 4, 20, 5), (1, 1, 1, 1, 5, 6)],
)
def test_triton_grid(batch, length, groups, heads, keys, size, documents, dtype):
    inputs = scan_inputs("ssd", batch, length, heads, keys, size, groups=groups, documents=documents, dtype=dtype)
    compare(ssd, inputs, "triton", return_final_state=True)


ROWS = "seen = row[:, None] {} row[None, :]\n        if"
CARRY = "d_state = dot(tl.trans(q_tile), weighted, PRECISION, d_state * passed)"
MUTANTS = [
    (ROWS.format(">="), ROWS.format(">")),
    ("PRECISION, out)\n", "PRECISION)\n"),  # forgets what comes from the state
    ("state = dot(tl.trans(k_tile), weighted, PRECISION, state * passed)\n        decay", "decay"),
    ("dv + place, heads * V", "dv + place, V"),
    ("tl.cumsum(leaving, 0) - leaving", "tl.cumsum(leaving, 0)"),
    (CARRY, "d_state *= passed"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    inputs = scan_inputs("ssd", 1, 20, 2, 3, 4)

    def check():
        compare(ssd, inputs, "triton", return_final_state=True)

    with mutated("ssd", old, new, tmp_path, files=("triton_forward", "triton")):
        assert not agrees(check)

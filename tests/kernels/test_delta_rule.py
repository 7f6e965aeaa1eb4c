"""`delta_rule`: closed form, golden values, eager and Triton against the reference, and broken kernels."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import delta_rule, delta_rule_step
from mixerzoo.tests.kernels.scans import RESETS, check_golden_scan, scan_inputs, with_resets
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, error, mutated, run, widen
from mixerzoo.tests.utils import load_golden, relative_error

BACKENDS = ("eager", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_overwrites(backend):
    """With beta 1 and unit keys, the value under a key is the last one written; other keys are left alone."""
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 0]][None, :, None]
    values = torch.arange(10.0, dtype=torch.float64).view(1, 5, 1, 2)
    ones = torch.ones(1, 5, 1, dtype=torch.float64)
    _, state = delta_rule(keys, keys, values, ones, scale=1.0, return_final_state=True, backend=backend)
    assert torch.allclose(state[0, 0], values[0, [4, 1, 3], 0])


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("gated", [False, True])
def test_golden_fla(backend, gated):
    golden = load_golden("fla_gated_delta_rule" if gated else "fla_delta_rule")

    def run(q, k, v, beta, g=None, initial_state=None):
        if not gated:  # head first
            q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
        o, state = delta_rule(
            q, k, v, beta, g, scale=golden.kwargs["scale"], initial_state=initial_state,
            return_final_state=True, backend=backend,
        )  # fmt: skip
        return {"o": o if gated else o.transpose(1, 2), "state": state}

    inputs = golden.group("input")
    check_golden_scan(
        run, inputs, golden,
        {"o": "output.o", "state": "output.final_state"},
        {"o": "cotangent.o", "state": "cotangent.final_state"},
        {n: f"grad.input.{n}" for n in inputs},
    )  # fmt: skip


def test_reference_gradients():
    check_reference(delta_rule, scan_inputs("delta_rule", 1, 6, 1, 2, 3, documents=True), return_final_state=True)


@pytest.mark.parametrize("length", [1, 41, 63, 100, 150])
def test_eager(length):
    inputs = scan_inputs("delta_rule", 2, length, 2, 5, 6, documents=length > 50, strided=length == 41)
    compare(delta_rule, inputs, "eager", return_final_state=True)


def test_eager_variants():
    compare(delta_rule, scan_inputs("delta_rule", 1, 70, 2, 5, 6, gates=False, initial=False), "eager")
    compare(delta_rule, scan_inputs("delta_rule", 1, 63, 2, 5, 6, decay=20.0), "eager", tolerance=3e-6)


@pytest.mark.parametrize("kind", RESETS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_resets(backend, kind):
    """Strong decays among mild ones: a difference of sums in one number is off by 2e-3, or not a number."""
    length = 130 if backend == "eager" else 41
    inputs = with_resets(scan_inputs("delta_rule", 1, length, 1, 5, 6, decay=0.1), kind)
    compare(delta_rule, inputs, backend, tolerance=3e-6, return_final_state=True)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_share_keys(backend, dtype):
    """Four heads of values read and write by the queries and keys of two."""
    length = 70 if backend == "eager" else 21
    inputs = scan_inputs("delta_rule", 2, length, 4, 5, 6, groups=2, documents=True, dtype=dtype)
    compare(delta_rule, inputs, backend, return_final_state=True)
    repeated = inputs | {name: inputs[name].repeat_interleave(2, 2) for name in ("q", "k")}
    y, state = delta_rule(**inputs, return_final_state=True, backend="reference")
    y_repeated, state_repeated = delta_rule(**repeated, return_final_state=True, backend="reference")
    assert torch.equal(y, y_repeated)
    assert torch.equal(state, state_repeated)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_gates(backend):
    """Lengths, the sigmoid of beta and the gate of Mamba-2 as options equal the same by hand, gradients included."""
    inputs = scan_inputs("delta_rule", 1, 21, 4, 5, 6, groups=2)
    generator = torch.Generator().manual_seed(3)
    for name in ("k", "beta", "g"):
        inputs[name] = torch.randn(inputs[name].shape, generator=generator)
    inputs |= {name: torch.randn(4, generator=generator) for name in ("A_log", "dt_bias")}

    def by_hand(q, k, v, beta, g, A_log, dt_bias, *, normalize, beta_range, **rest):
        q, k = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q, k))
        g = -(g + dt_bias).exp().log1p() * A_log.exp()
        return delta_rule(q, k, v, beta_range / (1 + (-beta).exp()), g, **rest)

    options = {"normalize": True, "beta_range": 2.0, "return_final_state": True}
    found = run(delta_rule, inputs, backend=backend, **options)
    expected = run(by_hand, widen(inputs), backend="reference", **options)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert error(value, expected[name]) < 1e-5, name
    rest = {n: inputs[n] for n in ("A_log", "dt_bias")} | {"normalize": True, "beta_range": 2.0}
    if backend != "eager":
        with torch.no_grad():
            token = (inputs[n][:, 0] for n in ("q", "k", "v", "beta", "g"))
            y_t, _ = delta_rule_step(*token, inputs["initial_state"], backend=backend, **rest)
        assert error(y_t, found["output 0"][:, 0]) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_steps_of_heads_that_share_keys(backend):
    x = scan_inputs("delta_rule", 2, 3, 4, 3, 5, groups=2)
    state = x.pop("initial_state")
    y, last = delta_rule(**x, initial_state=state, return_final_state=True, backend="reference")
    for t in range(3):
        y_t, state = delta_rule_step(*(x[n][:, t] for n in ("q", "k", "v", "beta", "g")), state, backend=backend)
        assert relative_error(y_t, y[:, t]) < 1e-5
    assert relative_error(state, last) < 1e-5


def test_equal_keys_stay_accurate():
    """The hardest system: all keys equal, with powers of up to 1e18 but an inverse of at most 1."""
    inputs = scan_inputs("delta_rule", 1, 64, 1, 3, 4, gates=False)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 64, -1, -1).contiguous()
    inputs["beta"] = torch.ones_like(inputs["beta"])
    for backend in ("eager", "triton"):
        with torch.no_grad():
            assert (
                relative_error(delta_rule(**inputs, backend=backend), delta_rule(**inputs, backend="reference")) < 1e-5
            )


@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
def test_empty(backend):
    for batch, length in ((0, 5), (2, 0)):
        inputs = scan_inputs("delta_rule", batch, length, 2, 3, 4)
        y, state = delta_rule(**inputs, return_final_state=True, backend=backend)
        assert y.shape == (batch, length, 2, 4)
        assert torch.equal(state, inputs["initial_state"])


def test_steps_equal_scan():
    x = scan_inputs("delta_rule", 2, 9, 2, 3, 4)
    state = x.pop("initial_state")
    y, last = delta_rule(**x, initial_state=state, return_final_state=True, backend="eager")
    for t in range(9):
        y_t, state = delta_rule_step(*(x[n][:, t] for n in ("q", "k", "v", "beta", "g")), state, backend="eager")
        assert relative_error(y_t, y[:, t]) < 1e-5
    assert relative_error(state, last) < 1e-5


def test_compiles():
    x = scan_inputs("delta_rule", 1, 70, 1, 3, 4, documents=True)
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**x, backend="eager"), delta_rule(**x, backend="eager")) < 1e-6
    x = scan_inputs("delta_rule", 1, 10, 1, 3, 4)
    assert relative_error(compiled(**x, backend="triton"), delta_rule(**x, backend="reference")) < 1e-5


def test_messages():
    x = scan_inputs("delta_rule", 1, 4, 2, 3, 4)
    with pytest.raises(ConfigError, match=r"beta has shape \(1, 4, 1\)"):
        delta_rule(**{**x, "beta": x["beta"][..., :1]})
    x = scan_inputs("delta_rule", 1, 4, 3, 3, 4, groups=2)
    with pytest.raises(ConfigError, match="3 heads of v are not divisible into the 2 groups"):
        delta_rule(**x)
    x = scan_inputs("delta_rule", 1, 4, 2, 3, 4)
    with pytest.raises(ConfigError, match="A_log and dt_bias belong together; dt_bias is missing"):
        delta_rule(**x, A_log=torch.zeros(2))
    with pytest.raises(ConfigError, match="need g"):
        delta_rule(**x | {"g": None}, A_log=torch.zeros(2), dt_bias=torch.zeros(2))


# -- Triton, interpreted


def test_triton_small():
    inputs = scan_inputs("delta_rule", 1, 41, 1, 5, 6, documents=True, strided=True)
    compare(delta_rule, inputs, "triton", return_final_state=True)


def test_triton_split():
    """Keys and values of more than one block: products are split, and the gradients loop three times."""
    inputs = scan_inputs("delta_rule", 1, 21, 1, 20, 18, documents=True)
    compare(delta_rule, inputs, "triton", return_final_state=True)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, "tf32x3"), (torch.bfloat16, "tf32")])
def test_the_solve_is_multiplied_as_exactly_as_its_inputs_deserve(dtype, expected, monkeypatch):
    """Correlated keys in float16 are off by more than its tolerance where matrix units take TF32."""
    import triton.language as tl
    from mixerzoo.kernels.common import tiles
    from mixerzoo.kernels.delta_rule import triton_solve

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **constants: launches.append(constants["PRECISION"])

    launches: list[str] = []
    monkeypatch.setattr(tiles, "on_nvidia", lambda: True)
    monkeypatch.setattr(tiles, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(triton_solve, "_solve_kernel", Recorder())
    delta_rule(**scan_inputs("delta_rule", 1, 5, 1, 16, 16, dtype=dtype), backend="triton")
    assert launches == [expected]


def test_triton_bfloat16():
    inputs = scan_inputs("delta_rule", 1, 33, 1, 16, 5, dtype=torch.bfloat16)
    compare(delta_rule, inputs, "triton", return_final_state=True)


def test_opcheck():
    from mixerzoo.kernels.delta_rule.triton import _forward_op

    x = scan_inputs("delta_rule", 1, 5, 1, 3, 4)
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v", "beta", "g")]
    torch.library.opcheck(_forward_op.op, (*leaves, 0.5, x["initial_state"].requires_grad_(), None, None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "keys", "size"),
    [(2, 63, 2, 16, 16), (1, 41, 1, 64, 70), (1, 100, 1, 70, 16), (1, 150, 2, 20, 5), (1, 1, 1, 5, 6)],
)
def test_triton_grid(batch, length, heads, keys, size, documents, dtype):
    inputs = scan_inputs("delta_rule", batch, length, heads, keys, size, documents=documents, dtype=dtype)
    compare(delta_rule, inputs, "triton", return_final_state=True)


MUTANTS = [
    ("seen = row[:, None] > row[None, :]", "seen = row[:, None] >= row[None, :] + 2"),
    ("dot(tl.trans(k_tile), weighted, PRECISION, d_state)", "d_state * 1.0"),
    ("sent += tl.sum(dot(k_tile, d_state, PRECISION) * new, 1)", "sent += 0.0"),
    ("(d_gram + tl.trans(d_gram))", "d_gram"),
    ("dv + values, heads * V", "dv + values, V"),
    ("d_rate += tl.sum(d_decayed * gram, 1)", "d_rate += 0.0"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_kernel_is_caught(old, new, tmp_path):
    inputs = scan_inputs("delta_rule", 1, 5, 2, 3, 4)

    def check():
        compare(delta_rule, inputs, "triton", return_final_state=True)

    with mutated("delta_rule", old, new, tmp_path, files=("triton_solve", "triton")):
        assert not agrees(check)

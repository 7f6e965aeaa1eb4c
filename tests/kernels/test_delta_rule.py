"""`delta_rule`: closed form, golden values, eager and Triton against the reference, and broken kernels."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import delta_rule, delta_rule_step
from mixerzoo.tests.kernels.scans import check_golden_scan, scan_inputs
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated
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
    # 63 steps of up to -20: a difference of sums near 1000 is good to 6e-5
    compare(delta_rule, scan_inputs("delta_rule", 1, 63, 2, 5, 6, decay=20.0), "eager", tolerance=2e-4)


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
    torch.library.opcheck(_forward_op.op, (*leaves, 0.5, x["initial_state"].requires_grad_(), None))


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

"""Single steps of `ssd`, `gla` and `delta_rule` on Triton (one kernel), interpreted.

Those of `selective_scan` and `causal_conv1d` are compared in their own files; here are their mutants.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import causal_conv1d_step, delta_rule_step, gla_step, selective_scan_step, ssd_step
from mixerzoo.tests.kernels.scans import scan_inputs
from mixerzoo.tests.kernels.utils import agrees, error, mutated, widen

OPS = {"ssd": ssd_step, "gla": gla_step, "delta_rule": delta_rule_step}
# in half precision y is rounded, and nothing else; sums of up to 130 terms in float32
TOLERANCE = {torch.float32: 8 * torch.finfo(torch.float32).eps}
TOLERANCE |= {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}


def step_inputs(op, batch, heads, keys, size, *, groups=None, gates=True, **options):
    inputs = scan_inputs(op, batch, 3, heads, keys, size, groups=groups, gates=gates, **options)
    state = inputs.pop("initial_state").float()
    inputs = {f"{name}_t": x[:, 1] for name, x in inputs.items()}  # from the middle: rows are not contiguous
    return {"g_t": None} | inputs | {"state": state}


def check(op, inputs, **options):
    run = OPS[op] if op == "gla" else partial(OPS[op], scale=0.7)
    ours = run(**inputs, backend="triton", **options)
    theirs = run(**widen(inputs), backend="reference", **options)
    assert ours[0].dtype == inputs["v_t"].dtype
    assert ours[1].dtype == torch.float32
    assert error(ours[0], theirs[0]) < TOLERANCE[inputs["v_t"].dtype]
    assert error(ours[1], theirs[1]) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("op", OPS)
def test_equals_reference(op, dtype):
    groups = 2 if op == "ssd" else None
    check(op, step_inputs(op, 2, 4, 5, 70, groups=groups, dtype=dtype))
    check(op, step_inputs(op, 1, 2, 130, 6, dtype=dtype, strided=True))


def test_without_gates():
    inputs = step_inputs("ssd", 1, 1, 1, 1, gates=False)
    check("ssd", inputs)
    check("delta_rule", step_inputs("delta_rule", 1, 1, 1, 1, gates=False))
    empty = {name: None if x is None else x[:0] for name, x in inputs.items()}
    assert ssd_step(**empty, backend="triton")[1].shape == (0, 1, 1, 1)


def test_the_state_is_not_changed():
    inputs = step_inputs("gla", 1, 1, 4, 4)
    before = inputs["state"].clone()
    gla_step(**inputs, backend="triton")
    assert torch.equal(before, inputs["state"])


@pytest.mark.parametrize("op", OPS)
def test_compiles_and_opcheck(op):
    from mixerzoo.kernels.common.chunked_scan_step import step_op

    x = step_inputs(op, 1, 2, 4, 3)
    y, state = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")(**x, backend="triton")
    expected = OPS[op](**x, backend="reference")
    assert error(y, expected[0]) < 1e-6
    assert error(state, expected[1]) < 1e-6
    args = (x["q_t"], x["k_t"], x["v_t"], x["g_t"], x.get("beta_t"), x["state"], 0.5, op == "delta_rule")
    torch.library.opcheck(step_op.op, args)


def test_float64_is_refused():
    with pytest.raises(ConfigError, match="not float64"):
        gla_step(**widen(step_inputs("gla", 1, 1, 2, 2)), backend="triton")


MUTANTS = [
    ("ssd", "h // group * k_h", "h * k_h"),
    ("ssd", "value *= tl.load(beta", "value += tl.load(beta"),
    ("ssd", "s *= tl.exp(tl.load(g + place).to", "s *= tl.exp(tl.load(g).to"),
    ("gla", "g + place * K + key", "g + key"),
    ("gla", "s += k_row[:, None]", "s = k_row[:, None]"),
    ("gla", "(key < K)[:, None] & (col < V)[None, :]", "(key < K)[:, None] & (col < V - 1)[None, :]"),
    ("delta_rule", "value -= tl.sum(k_row[:, None] * s, 0)", "value -= 0.0"),
]


@pytest.mark.parametrize(("op", "old", "new"), MUTANTS)
def test_broken_kernel_is_caught(op, old, new, tmp_path):
    inputs = step_inputs(op, 2, 4, 3, 5, groups=2 if op == "ssd" else None)
    with mutated("common", old, new, tmp_path, files=("chunked_scan_step",)):
        assert not agrees(lambda: check(op, inputs))


def check_scan_step():
    u, delta, z = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))[
        :, :, 1
    ]  # rows of a longer memory
    b, c = torch.randn(2, 2, 4, 2, 3, generator=torch.Generator().manual_seed(1))[:, :, 1]
    A, state = -torch.rand(6, 3, generator=torch.Generator().manual_seed(2)), torch.ones(2, 6, 3)
    tensors = {
        "u_t": u,
        "delta_t": delta.abs(),
        "A": A,
        "B_t": b,
        "C_t": c,
        "D": torch.ones(6),
        "state": state,
        "z_t": z,
    }
    ours = selective_scan_step(**tensors, backend="triton")
    for a, b in zip(ours, selective_scan_step(**widen(tensors), backend="reference"), strict=True):
        assert error(a, b) < 1e-6


def check_conv_step():
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))[:, 1]
    weight, state = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.randn(2, 3, 5)
    tensors = {"x_t": x, "weight": weight, "bias": torch.ones(5), "state": state}
    ours = causal_conv1d_step(**tensors, backend="triton")
    for a, b in zip(ours, causal_conv1d_step(**widen(tensors), backend="reference"), strict=True):
        assert error(a, b) < 1e-6


STEPS = {"selective_scan": ("triton_step", check_scan_step), "causal_conv1d": ("triton", check_conv_step)}
STEP_MUTANTS = [
    ("selective_scan", "(n[None, :] < N)", "(n[None, :] < N - 1)"),
    ("selective_scan", "y += tl.load(D_ptr", "y = tl.load(D_ptr"),
    ("selective_scan", "group[:, None] * B_g", "group[:, None] * N2"),
    (
        "causal_conv1d",
        "state_ptr + at + k * channels, mask=real",
        "state_ptr + at + k * channels, mask=c < channels - 1",
    ),
    ("causal_conv1d", "y += tl.load(weight_ptr + c * K + k", "y = tl.load(weight_ptr + c * K + k"),
    ("causal_conv1d", "x_ptr + row * x_b + c, mask", "x_ptr + row * channels + c, mask"),
    ("causal_conv1d", "new_ptr + at + (k - 1) * channels", "new_ptr + at + k * channels"),
]


@pytest.mark.parametrize("op", STEPS)
def test_the_unbroken_kernel_passes_the_same_check(op):
    STEPS[op][1]()


@pytest.mark.parametrize(("op", "old", "new"), STEP_MUTANTS)
def test_broken_step_is_caught(op, old, new, tmp_path):
    file, passes = STEPS[op]
    with mutated(op, old, new, tmp_path, files=(file,)):
        assert not agrees(passes)

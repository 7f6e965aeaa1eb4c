"""selective_scan and its step: closed forms, official values, and every path against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import selective_scan, selective_scan_step
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, error, mutated, run, skewed, widen
from mixerzoo.tests.utils import load_golden, rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# (batch, length, channels, groups, states)
TINY = (1, 5, 4, 2, 3)


def inputs(
    size: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    full: bool = True,
    documents: bool = False,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random inputs; parameters and states stay in float32 at least, as in a model under autocast."""
    batch, length, channels, groups, states = size
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found: dict[str, Tensor | None] = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -4 * torch.rand(channels, states, generator=generator).to(wide),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
    }
    if not full:
        found["delta"] = found["delta"].abs()  # for calls without softplus: a negative step would blow up
    if full:
        found |= {
            "D": normal(channels, dtype=wide),
            "z": normal(batch, length, channels),
            "delta_bias": normal(channels, dtype=wide),
            "initial_state": normal(batch, channels, states, dtype=wide),
        }
    if documents:  # some documents of length 1, and an id that comes back
        ids = torch.randint(0, 3, (batch, length), generator=generator)
        found["document_ids"] = ids.where(torch.rand(batch, length, generator=generator) < 0.5, torch.zeros_like(ids))
    return found


OPTIONS = {"delta_softplus": True, "return_final_state": True}


def test_without_decay_it_is_a_running_sum():
    u, ones = torch.randn(2, 9, 3), torch.ones(2, 9, 3)
    y = selective_scan(u, ones, torch.zeros(3, 2), torch.ones(2, 9, 1, 2), torch.ones(2, 9, 1, 2), backend="reference")
    assert error(y, 2 * u.cumsum(1)) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_constant_decay_is_a_geometric_series(backend):
    length, rate, step = 40, -0.3, 0.5
    u = torch.zeros(1, length, 1)
    u[:, 0] = 1.0
    one = torch.ones(1, length, 1, 1)
    y, state = selective_scan(
        u, torch.full_like(u, step), torch.full((1, 1), rate), one, one, return_final_state=True, backend=backend
    )
    expected = step * torch.exp(rate * step * torch.arange(length))
    assert error(y[0, :, 0], expected) < 1e-5
    assert error(state[0, 0], expected[-1:]) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(
    "name",
    [
        "mamba1_selective_scan",
        "mamba1_selective_scan_groups",
        "mamba1_selective_scan_const_bc",
        "vmamba_selective_scan",
    ],
)
def test_golden(name, backend):
    golden = load_golden(name)
    given = {k: v.clone().requires_grad_() for k, v in golden.group("input").items()}
    u = given["u"].mT
    batch, length, _ = u.shape

    def grouped(x: Tensor) -> Tensor:
        if x.dim() == 2:  # (D, N), constant over time: one group for each channel
            return x.expand(batch, length, *x.shape)
        return (x[:, None] if x.dim() == 3 else x).permute(0, 3, 1, 2)

    y, state = selective_scan(
        u,
        given["delta"].mT,
        given["A"],
        grouped(given["B"]),
        grouped(given["C"]),
        given.get("D"),
        z=given["z"].mT if "z" in given else None,
        delta_bias=given.get("delta_bias"),
        delta_softplus=golden.json("kwargs", {}).get("delta_softplus", name.startswith("vmamba")),
        return_final_state=True,
        backend=backend,
    )
    outputs = golden.group("output")
    assert error(y.mT, outputs.get("out", outputs.get(""))) < 1e-5
    cotangents = golden.group("cotangent")
    loss = (y.mT * cotangents.get("out", cotangents.get(""))).sum()
    if "last_state" in outputs:
        assert error(state, outputs["last_state"]) < 1e-5
        loss = loss + (state * cotangents["last_state"]).sum()
    loss.backward()
    for key, gradient in golden.group("grad.input").items():
        assert error(given[key].grad, gradient) < 2e-5, key


def test_reference_gradients():
    check_reference(selective_scan, inputs(TINY, documents=True), **OPTIONS)
    check_reference(selective_scan, inputs(TINY, full=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size", [(2, 41, 6, 2, 3), (1, 1, 3, 1, 1), (2, 300, 70, 1, 2), (1, 7, 40, 1, 16), (3, 19, 8, 4, 1)]
)
def test_eager(size, dtype):
    compare(selective_scan, inputs(size, dtype, documents=size[1] > 1), "eager", **OPTIONS)
    # the gradient of A sums what cancels, from a gradient of y that was rounded to half precision
    loose = {"gradient of A": 1.6e-2} if dtype == torch.bfloat16 else {}
    compare(selective_scan, inputs(size, dtype, full=False), "eager", loose=loose)


def test_eager_does_not_divide_by_vanishing_decays():
    given = inputs((1, 100, 8, 1, 2))
    given["A"] = given["A"] * 1000
    compare(selective_scan, given, "eager", **OPTIONS)
    given["A"] = torch.zeros_like(given["A"])
    compare(selective_scan, given, "eager", **OPTIONS)


def test_eager_keeps_no_state_per_token():
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    given = {k: v.requires_grad_() for k, v in inputs((1, 1024, 32, 1, 64), full=False).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(**given, delta_softplus=True)
    inputs_and_steps = sum(v.numel() for v in given.values()) + 3 * given["u"].numel()
    assert kept < inputs_and_steps + 1024 * 32 * 64 / 128  # the states would be 1024 * 32 * 64


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_empty_sequence(backend):
    found = run(selective_scan, inputs((2, 0, 4, 2, 3)), backend=backend, **OPTIONS)
    assert found["output 0"].shape == (2, 0, 4)
    assert error(found["output 1"], inputs((2, 0, 4, 2, 3))["initial_state"]) == 0
    assert not found["gradient of A"].any()
    assert found["gradient of initial_state"].all()


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_documents_are_separate_sequences(backend):
    given = inputs((1, 23, 4, 1, 2), full=False)
    packed = selective_scan(**given, document_ids=torch.tensor([[5] * 7 + [0] * 1 + [5] * 15]), backend=backend)
    parts = [
        selective_scan(**{k: v if k == "A" else v[:, a:b] for k, v in given.items()}, backend=backend)
        for a, b in ((0, 7), (7, 8), (8, 23))
    ]
    assert error(packed, torch.cat(parts, 1)) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_state_continues_a_sequence(backend):
    given = inputs((2, 30, 4, 2, 3))
    whole, last = selective_scan(**given, **OPTIONS, backend=backend)
    state = given.pop("initial_state")
    parts = []
    for a, b in ((0, 11), (11, 30)):
        part = {k: v[:, a:b] if v.dim() > 2 else v for k, v in given.items()}
        y, state = selective_scan(**part, initial_state=state, **OPTIONS, backend=backend)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 1e-5
    assert error(state, last) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(dtype):
    # two tiles, groups, documents, channels that do not fill a block
    compare(selective_scan, inputs((2, 70, 6, 2, 3), dtype, documents=True), "triton", **OPTIONS)


def test_triton_several_blocks_and_strides():
    given = inputs((1, 20, 41, 1, 2))
    given = {k: skewed(v) for k, v in given.items()}
    compare(selective_scan, given, "triton", **OPTIONS)


def test_triton_smallest():
    compare(selective_scan, inputs((1, 1, 3, 1, 1), torch.float16), "triton", **OPTIONS)
    compare(selective_scan, inputs((1, 9, 8, 4, 2), full=False), "triton")


def test_triton_more_states_than_a_launch_takes():
    given = inputs((1, 18, 3, 1, 35))
    compare(selective_scan, given, "triton", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 63, 70, 1, 16), (2, 41, 12, 4, 1), (1, 100, 41, 1, 5), (3, 129, 3, 1, 2), (1, 200, 66, 2, 4)]
)
def test_triton_grid(size, documents, dtype):
    for full in (True, False):
        compare(selective_scan, inputs(size, dtype, full=full, documents=documents), "triton", **OPTIONS)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_same_bits_every_time(backend):
    given = inputs((1, 20, 5, 1, 2))
    first, second = (run(selective_scan, given, backend=backend, **OPTIONS) for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_opcheck():
    from mixerzoo.kernels.selective_scan import eager, triton, triton_step

    given = {k: v.requires_grad_() for k, v in inputs((1, 9, 4, 2, 2)).items()}
    u, s, A, B, C, initial = (given[k] for k in ("u", "delta", "A", "B", "C", "initial_state"))
    starts = torch.zeros(1, 9, dtype=torch.bool)
    bias, skip = (given[k].unflatten(0, (2, 2)) for k in ("delta_bias", "D"))
    split = (A.unflatten(0, (2, 2)), B, C)
    tokens = (u.unflatten(2, (2, 2)), s.unflatten(2, (2, 2)))
    torch.library.opcheck(
        eager.forward_op.op, (*tokens, bias, True, *split, skip, initial.unflatten(1, (2, 2)), starts, None)
    )
    torch.library.opcheck(eager.forward_op.op, (*tokens, None, False, *split, None, None, None, None))
    torch.library.opcheck(
        triton.forward_op.op,
        (u, s, A, B, C, given["D"], given["z"], given["delta_bias"], initial, starts, None, True, True),
    )
    step = (u[:, 0], s[:, 0], A, B[:, 0], C[:, 0], given["D"], initial, None, None, False)
    torch.library.opcheck(triton_step.step_op.op, tuple(x.detach() if isinstance(x, Tensor) else x for x in step))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_without_graph_break(backend):
    given = inputs((1, 9, 4, 2, 2), documents=True)

    def function(**tensors):
        return selective_scan(**tensors, **OPTIONS, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = run(function, given), run(compiled, given)
    assert all(error(found[k], v) < 1e-6 for k, v in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_steps_equal_the_scan(backend, dtype):
    given = inputs((2, 6, 6, 2, 3), dtype)
    y, last = selective_scan(**given, **OPTIONS, backend="reference")
    state, rows = given["initial_state"], []
    for t in range(6):
        row, state = selective_scan_step(
            given["u"][:, t], given["delta"][:, t], given["A"], given["B"][:, t], given["C"][:, t], given["D"], state,
            z_t=given["z"][:, t], delta_bias=given["delta_bias"], delta_softplus=True, backend=backend,
        )  # fmt: skip
        rows.append(row)
    # in half precision y is rounded, and nothing else; steps, states and outputs are sums of 2 to 6 terms in float32
    exact = rounding(torch.float32, 6, 3, 3)
    assert error(torch.stack(rows, 1), y) < (exact if dtype == torch.float32 else rounding(dtype, 6))
    assert error(state, last) < exact
    assert state.dtype == torch.float32


def test_step_has_gradients_or_says_so():
    given = inputs((1, 1, 4, 1, 2))
    args = [given[k] if k == "A" else given[k][:, 0] for k in ("u", "delta", "A", "B", "C")]
    args[0].requires_grad_()
    y, _ = selective_scan_step(*args, None, given["initial_state"])
    assert torch.autograd.grad(y.sum(), args[0])[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match="no gradient"):
        selective_scan_step(*args, None, given["initial_state"], backend="triton")


def test_small_steps_keep_their_digits():
    """softplus(-9) is 1.2e-4; log(1 + exp(-9)) in float32 would be wrong by 1e-4 of that."""
    given = inputs((1, 4, 3, 1, 2), full=False)
    given["delta"] = torch.full_like(given["delta"], -9.0)
    assert (
        error(
            selective_scan(**given, delta_softplus=True, backend="triton"),
            selective_scan(**{k: v.double() for k, v in given.items()}, delta_softplus=True, backend="reference"),
        )
        < 2e-6
    )
    assert math.isclose(math.log1p(math.exp(-9)), 1.2340e-4, rel_tol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_zeros_for_a_final_state_that_nobody_uses(backend):
    """Its gradient is as large as the state; without one the backward pass gets none."""
    given: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == f"mixerzoo::selective_scan_{backend}_backward":
                names = [argument.name for argument in func._schema.arguments]
                given.append(args[names.index("dfinal")] is not None)
            return func(*args, **kwargs or {})

    x = inputs((2, 9, 4, 2, 3), documents=True)
    for final in (False, True):
        leaves = {n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in x.items()}
        y, state = selective_scan(**leaves, **OPTIONS, backend=backend)
        with Watch():
            (y.sum() + state.sum() if final else y.sum()).backward()
    assert given == [False, True]
    exact = run(lambda **kw: selective_scan(**kw)[0], widen(x), backend="reference", **OPTIONS)
    ours = run(lambda **kw: selective_scan(**kw)[0], x, backend=backend, **OPTIONS)
    assert all(error(ours[name], exact[name]) < 1e-5 for name in exact)


def test_mistakes_are_explained():
    given = inputs(TINY)
    with pytest.raises(ConfigError, match=r"delta has shape \(1, 4, 4\); expected \(1, 5, 4\)"):
        selective_scan(**(given | {"delta": given["delta"][:, :4]}))
    with pytest.raises(ConfigError, match="not divisible"):
        selective_scan(**(given | {k: torch.randn(1, 5, 3, 3) for k in "BC"}))
    with pytest.raises(RuntimeError, match="not float64"):
        selective_scan(**{k: v.double() for k, v in given.items()}, backend="triton")


MUTANTS = {
    "a wrong stride": ("(origin + t) * channels + d, channels, y", "(origin + t) * N + d, channels, y"),
    "a missing accumulation": ("dA[1:] + (dA[0] + dA_n,)", "dA[1:] + (dA_n,)"),
    "a mask off by one": ("group * width + inside, inside < width", "group * width + inside, inside < width - 1"),
    "a scan that forgets a decay": ("a_next * b + b_next", "b + b_next"),
    "chunks that are not joined": ("tl.where(q == start, carried, entering)", "carried"),
    "a boundary that is ignored": ("a = tl.where(starts[p], 0.0, a)", "a = a"),
    "blocks that overwrite each other": ("total += tl.load(parts_ptr", "total = tl.load(parts_ptr"),
    "the last tile first": ("tile = tiles - 1 - back", "tile = back"),
    "a state that is not handed on": ("H = H[1:] + (last,)", "H = H[1:] + (H[0],)"),
    "halves swapped the wrong way": ("tl.where(upper, high, low) +", "tl.where(upper, low, high) +"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_kernels_are_caught(mutant, tmp_path):
    old, new = MUTANTS[mutant]
    given = inputs((1, 70, 36, 1, 2), documents=True)
    with mutated("selective_scan", old, new, tmp_path, files=("triton_tiles", "triton_kernels", "triton")):
        assert not agrees(lambda: compare(selective_scan, given, "triton", **OPTIONS))


def test_the_unbroken_kernel_passes_the_same_check():
    compare(selective_scan, inputs((1, 70, 36, 1, 2), documents=True), "triton", **OPTIONS)

"""grid_scan: the selective scan token by token along every path, for outputs and all gradients."""

from __future__ import annotations

import functools
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import LinePath, grid_scan
from mixerzoo.kernels.grid_scan import eager as module
from mixerzoo.tests.kernels.utils import TOLERANCE, agrees, error, mutated, run, skewed, widen
from torch.utils.flop_counter import FlopCounterMode

PATHS = [LinePath(*bits) for bits in itertools.product((False, True), repeat=3)]
SIZES = [(2, 5, 7, 3), (1, 1, 1, 1), (1, 9, 1, 2), (2, 1, 17, 3), (1, 16, 8, 4), (2, 3, 70, 2), (3, 13, 9, 5)]


def inputs(batch, height, width, channels, *, paths=4, rank=2, states=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * width)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    found = {
        "u": randn(batch, height, width, channels),
        "low": randn(batch, height, width, paths, rank + 2 * states),
        "dt_proj": randn(paths, channels, rank),
        "dt_bias": randn(paths, channels) - 1,
        "A": -randn(paths, channels, states).exp(),
        "D": randn(paths, channels),
    }
    return {k: v.to(dtype) for k, v in found.items()}


def order(path: LinePath, height: int, width: int) -> list[tuple[int, int]]:
    """The tokens as a path visits them."""
    lines, positions = (width, height) if path.columns else (height, width)
    found = []
    for line in range(lines)[:: -1 if path.last_line_first else 1]:
        for position in range(positions)[:: -1 if path.from_its_end else 1]:
            found.append((position, line) if path.columns else (line, position))
    return found


def by_token(u, low, dt_proj, dt_bias, A, D, paths):
    """The definition, one token after the other."""
    batch, height, width, channels = u.shape
    y = torch.zeros_like(u)
    rank, states = dt_proj.shape[2], A.shape[2]
    for k, path in enumerate(paths):
        h = u.new_zeros(batch, channels, states)
        outputs = {}
        for i, j in order(path, height, width):
            r, b, c = low[:, i, j, k].split((rank, states, states), -1)
            s = F.softplus(r @ dt_proj[k].T + dt_bias[k])
            h = (s.unsqueeze(-1) * A[k]).exp() * h + (s * u[:, i, j]).unsqueeze(-1) * b.unsqueeze(1)
            outputs[i, j] = (h * c.unsqueeze(1)).sum(-1) + D[k] * u[:, i, j]
        rows = [torch.stack([outputs[i, j] for j in range(width)], 1) for i in range(height)]
        y = y + torch.stack(rows, 1)
    return y


def differences(given, paths, tolerance=None):
    ours = run(grid_scan, given, paths=paths)
    theirs = run(by_token, widen(given), paths=paths)
    limit = tolerance or max(TOLERANCE[v.dtype] for v in given.values())
    return {k: error(v, theirs[k]) for k, v in ours.items() if error(v, theirs[k]) > limit}


@pytest.mark.parametrize("path", PATHS)
def test_each_path(path):
    for size in SIZES:
        assert not differences(inputs(*size, paths=1), [path]), size


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_of_paths(states, dtype):
    given = inputs(2, 5, 12, 3, paths=8, states=states, dtype=dtype)
    assert not differences(given, PATHS)
    assert grid_scan(**given, paths=PATHS).dtype == dtype


def test_only_rows_and_only_columns():
    for path in (PATHS[0], PATHS[4]):
        assert not differences(inputs(1, 4, 9, 2, paths=2), [path, path.backwards()])


@pytest.mark.parametrize(("block", "channels"), [(1, 1), (200, 2), (400, 2)])
def test_blocks_of_samples_and_channels(block, channels, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "MIN_CHANNELS", channels)
    assert not differences(inputs(3, 9, 10, 5), PATHS[::2])


def test_strided_inputs():
    given = {k: skewed(v) for k, v in inputs(2, 4, 6, 3).items()}
    assert not differences(given, PATHS[2:6])


def test_long_decays_neither_vanish_nor_overflow():
    given = inputs(1, 20, 30, 2)
    given["A"] *= 50
    given["dt_bias"] += 8  # products of decays along a line are zero in float32
    assert not differences(given, PATHS[:4])


@pytest.mark.parametrize("size", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 4, 0)])
def test_nothing(size):
    found = run(grid_scan, inputs(*size), paths=PATHS[:4])
    assert found["output 0"].shape == size
    assert all(v.isfinite().all() for v in found.values())


def test_the_definition_is_the_same_token_by_token():
    given = widen(inputs(2, 3, 5, 2, paths=8))
    ours, theirs = (run(f, given, paths=PATHS) for f in (functools.partial(grid_scan, backend="reference"), by_token))
    assert all(error(ours[k], theirs[k]) < 1e-12 for k in theirs)


def test_the_variable_for_all_kernels_is_honoured(monkeypatch):
    given, called = inputs(1, 2, 3, 2, paths=1), []
    from_eager = module.grid_scan_eager
    monkeypatch.setattr(module, "grid_scan_eager", lambda *x: called.append(1) or from_eager(*x))
    for name, calls in (("reference", 0), ("eager", 1), ("triton", 2)):
        monkeypatch.setenv("MIXERZOO_KERNELS", name)
        grid_scan(**given, paths=PATHS[:1])
        assert len(called) == calls, name
    with pytest.raises(ConfigError, match="dt_bias"):
        grid_scan(**{**given, "dt_bias": given["dt_bias"][:, :1]}, paths=PATHS[:1])


def test_autocast_changes_nothing():
    given = {k: v.requires_grad_() for k, v in inputs(1, 3, 4, 2).items()}
    plain = run(grid_scan, given, paths=PATHS[:4])
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(grid_scan, given, paths=PATHS[:4])
    for name, value in plain.items():
        assert torch.equal(value, inside[name]), name


def test_gradcheck():
    given = widen(inputs(1, 3, 4, 2))
    leaves = [v.requires_grad_() for v in given.values()]
    assert torch.autograd.gradcheck(lambda *x: grid_scan(*x, paths=PATHS[1::2]), leaves)


def test_opcheck_and_compile():
    given = inputs(2, 3, 4, 2)
    codes = [path.code for path in PATHS[:4]]
    for make in (lambda v: v, skewed):
        leaves = [make(v).detach().requires_grad_() for v in given.values()]
        torch.library.opcheck(module.forward_op.op, (*leaves, codes))
    compiled = torch.compile(lambda **x: grid_scan(**x, paths=PATHS[:4]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), grid_scan(**given, paths=PATHS[:4]))


def test_flops_are_those_of_the_products_inside():
    given = {k: v.requires_grad_() for k, v in inputs(2, 3, 5, 7).items()}
    with FlopCounterMode(display=False) as counter:
        grid_scan(**given, paths=PATHS[:4])
    forward = counter.get_total_flops()
    assert forward == 4 * 2 * (2 * 3 * 5) * 7 * 2  # paths, multiply and add, tokens, channels, rank
    with FlopCounterMode(display=False) as counter:
        grid_scan(**given, paths=PATHS[:4]).sum().backward()
    assert counter.get_total_flops() == 4 * forward


def test_keeps_the_image_and_nothing_of_each_path():
    given = {k: v.requires_grad_() for k, v in inputs(2, 8, 8, 16).items()}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        grid_scan(**given, paths=PATHS[:4])
    assert sum(kept) == sum(v.numel() for v in given.values())


MUTANTS = [
    ("torch.addcmul(states[j], decay, end)", "states[j] + end"),
    ("pieces.prod(2)", "decays[last]"),
    ("inner.prod(2)", "(inner * pieces[:, :, :1]).prod(2)"),
    ("_times_previous(a, h, path)", "a.mul_(h)"),
    ("path.backwards(), before=True", "path.backwards()"),
    ("h[:, positions:] = 0.0", "pass"),
    ("q[:, positions:] = 0.0", "pass"),
    ("a[:, positions:] = 1.0", "a[:, positions:] = 0.0"),
    ("dA[k, e, n] +=", "dA[k, e, n] ="),
    ("y[m, ..., e] += total if columns else total.transpose(1, 2)", "y[m, ..., e] += total.view_as(y[m, ..., e])"),
    ("k == chosen[0][0] and n == 0", "n == 0"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_broken_scans_are_caught(old, new, tmp_path):
    given = inputs(3, 13, 9, 5)

    def check():
        copy = importlib.import_module("mixerzoo.kernels.grid_scan.eager")
        vars(copy)["BLOCK"] = 400  # several blocks
        paths = PATHS[1:5]
        ours, theirs = run(copy.grid_scan_eager, given, paths=paths), run(by_token, widen(given), paths=paths)
        assert all(error(v, theirs[k]) < 1e-4 for k, v in ours.items())

    with mutated("grid_scan", old, new, tmp_path, files=("eager",)):
        assert not agrees(check)

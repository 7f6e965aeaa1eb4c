"""`tools.traffic`: it counts right, and no kernel moves more than `docs/kernels.md` says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from mixerzoo.kernels.common.costs import Cost
from mixerzoo.kernels.common.discovery import find_cases, find_rooflines
from mixerzoo.tools.kernel_docs import replaced, roofline_table
from mixerzoo.tools.traffic import DOCUMENT, Traffic, documented, growth, main, measure

# Bytes by compulsory bytes, and launches: close above what is measured, and never above what was asked, of which
# `docs/kernels.md` has a table.
LIMITS = {
    "selective_scan.forward": (1.25, 1),  # B and C again for each 32 channels, from the cache
    "selective_scan.backward": (2.5, 3),  # z and dy twice, likewise; in registers meanwhile they would be spilled
    "causal_conv1d.forward": (1.1, 1),
    "pool_mix.forward": (2.4, 1),  # neighbouring columns are asked for again, from the cache
    "spectral_mlp.forward": (1.15, 1),
    "spectral_mlp.backward": (1.5, 2),
    "block_sparse_attention.forward": (1.05, 1),
    "block_sparse_attention.forward_large": (1.05, 1),
    "ssd.forward": (1.1, 1),
    "ssd.backward": (3.1, 5),
    "gla.forward": (2.5, 2),
    "delta_rule.forward": (3.4, 3),
}


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.float32), mask=i < n)


@triton.jit
def _dot_kernel(x_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, tl.dot(x, x, input_precision="ieee"))


def test_bytes_and_flops_are_counted():
    def case() -> dict[str, int]:
        x, y = torch.ones(40, dtype=torch.float16), torch.empty(40)
        _copy_kernel[3,](x, y, 40)
        _dot_kernel[1,](torch.zeros(256))
        return {"bytes": 2000, "flops": 4096}

    found = measure("op.case", case)
    assert found.kernels["_copy_kernel"] == Counter(launches=1, programs=3, read=80, written=160)
    assert found.kernels["_dot_kernel"] == Counter(launches=1, programs=1, read=1024, written=1024, flops=2 * 16**3)
    assert found.ratio == (80 + 160 + 2048) / 2000
    assert found.flops_ratio == 2.0


def test_a_case_without_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="no interpreted kernel"):
        measure("op.case", lambda: {"bytes": 1})


def test_growth_is_noticed():
    text = "| op.case | 1 | 2,000 | 1.000 | - |"
    figures = documented(text)
    assert figures == {"op.case": (1, 1.0, None)}

    def moved(written: int, launches: int = 1) -> Traffic:
        return Traffic("op.case", {"kernel": Counter(launches=launches, written=written)}, 2000)

    assert moved(2000).row() == text
    assert not growth(moved(2000), figures)
    assert not growth(moved(1900), figures)
    assert growth(moved(2010), figures)
    assert growth(moved(2000, launches=2), figures)
    assert growth(Traffic("op.other", {}, 1), figures)


@pytest.mark.parametrize("name", find_cases())
def test_no_kernel_moves_more_than_documented(name):
    assert not growth(measure(name, find_cases([name])[name]), documented())


def test_documentation_is_complete_and_within_the_limits():
    figures = documented()
    assert set(figures) == set(find_cases())
    for name, (ratio, launches) in LIMITS.items():
        if name in figures:
            assert figures[name][1] <= ratio, name
            assert figures[name][0] <= launches, name


def test_rooflines_are_those_of_the_cases():
    text = DOCUMENT.read_text()
    assert replaced(text, "roofline", roofline_table()) == text
    assert len(find_rooflines()) > 8


def test_floor():
    cost = Cost("op", "size", bytes=3_350_000_000, matmul=200 * 10**9, other=67 * 10**6)
    seconds, bound = cost.floor("H100")
    assert (round(seconds, 6), bound) == (1e-3, "memory")
    assert Cost("op", "size", bytes=1, matmul=312 * 10**9).floor("A100") == (1e-3, "matmul")
    assert Cost("op", "size", bytes=1, other=195 * 10**8).floor("A100") == (1e-3, "arithmetic")
    special = Cost("op", "size", bytes=1, exponentials=16 * 132 * 1_980_000)
    assert special.floor("H100") == (pytest.approx(1e-3), "exponentials")
    assert cost.intensity == (200 * 10**9 + 67 * 10**6) / 3_350_000_000


def test_mistakes_are_explained(capsys):
    assert main(["--only", "selective_scan.forwards"]) == 2
    assert 'Did you mean "selective_scan.forward"?' in capsys.readouterr().err

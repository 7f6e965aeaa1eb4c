"""`kernels.interpreter`: what it changes in Triton's interpreter gives what compiled kernels give."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from mixerzoo.kernels.common.interpreter import mend, original_cast, original_scan
from triton.runtime.interpreter import InterpreterBuilder, ScanOps


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, W: tl.constexpr):
    i = tl.program_id(0) * W + tl.arange(0, W)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.bfloat16), mask=i < n)


@triton.jit
def _store_kernel(x_ptr, y_ptr, n, W: tl.constexpr):
    i = tl.program_id(0) * W + tl.arange(0, W)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _scalar_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr))


def cast(x: torch.Tensor, kernel=_cast_kernel) -> torch.Tensor:
    """`x` in bfloat16, by an interpreted kernel."""
    mend()
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    kernel[triton.cdiv(len(x), 256),](x, y, len(x), W=256)
    return y


def floats(*bits: int) -> torch.Tensor:
    """Numbers by their bit patterns."""
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits(x: torch.Tensor) -> list[int]:
    """Bit patterns of bfloat16 numbers."""
    return [int(b) & 0xFFFF for b in x.view(torch.int16)]


@pytest.mark.parametrize("kernel", [_cast_kernel, _store_kernel])
def test_casts_round_as_torch_does(kernel):
    random = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    x = floats(*random.tolist())  # every exponent and sign: subnormal numbers, infinity and NaN among them
    assert torch.equal(cast(x, kernel).nan_to_num(7.0), x.to(torch.bfloat16).nan_to_num(7.0))
    assert torch.equal(cast(x, kernel).isnan(), x.isnan())


def test_ties_go_to_even():
    x = floats(0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F80_7FFF, 0xBF81_8000, 0x0000_8000, 0x0001_8000)
    assert bits(cast(x)) == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0x0000, 0x0002]


def test_carries_overflow_and_signs():
    carry, largest, overflow = floats(0x3FFF_FFFF, 0x7F7F_7FFF, 0x7F7F_8000)
    assert float(carry) < 2
    x = torch.stack([carry, largest, overflow, -overflow, torch.tensor(-0.0)])
    assert bits(cast(x)) == [0x4000, 0x7F7F, 0x7F80, 0xFF80, 0x8000]


def test_infinity_and_nan_stay():
    y = cast(floats(0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FFF_FFFF, 0xFFFF_FFFF))
    assert y[:2].tolist() == [float("inf"), float("-inf")]
    assert y[2:].isnan().all(), "a NaN whose upper bits are those of infinity, and one whose carry would be zero"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_other_dtypes(dtype):
    x = (torch.randn(100, generator=torch.Generator().manual_seed(0)) * 1000).to(dtype)
    assert torch.equal(cast(x), x.to(torch.bfloat16))


def test_scalars():
    mend()
    y = torch.empty(1, dtype=torch.bfloat16)
    _scalar_kernel[1,](floats(0x3F81_8000), y)
    assert bits(y) == [0x3F82]


def test_triton_itself_still_cuts_off(monkeypatch):
    """When this fails, `round_casts` has become superfluous."""
    x = floats(0x3F80_FFFF)
    assert bits(cast(x)) == [0x3F81]
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", original_cast())
    y = torch.empty(1, dtype=torch.bfloat16)
    _cast_kernel[1,](x, y, 1, W=16)
    assert bits(y) == [0x3F80]


@triton.jit
def _scan_kernel(a_ptr, b_ptr, out_ptr, REVERSE: tl.constexpr):
    at = tl.arange(0, 8)[:, None] * 4 + tl.arange(0, 4)[None, :]
    _, h = tl.associative_scan((tl.load(a_ptr + at), tl.load(b_ptr + at)), 0, _after, reverse=REVERSE)
    tl.store(out_ptr + at, h)


@triton.jit
def _after(a, h, a_next, h_next):
    return a * a_next, a_next * h + h_next


@pytest.mark.parametrize("reverse", [False, True])
def test_interpreted_scans_are_those_of_triton(reverse, monkeypatch):
    """`vectorize_scans` changes how fast the interpreter scans, and nothing else."""
    a, b = torch.randn(8, 4), torch.randn(8, 4)
    found, theirs = torch.empty(8, 4), torch.empty(8, 4)
    mend()
    assert ScanOps.generic_scan is not original_scan()
    _scan_kernel[1,](a, b, found, REVERSE=reverse)
    monkeypatch.setattr(ScanOps, "generic_scan", original_scan())
    _scan_kernel[1,](a, b, theirs, REVERSE=reverse)
    assert torch.equal(found, theirs)

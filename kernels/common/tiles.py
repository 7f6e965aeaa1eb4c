"""Pieces of Triton code that the chunked scans (`ssd`, `gla`, `delta_rule`) share, and their host-side counterparts.

B batch, L length, H heads, K key size, V value size, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from . import chunking
from .interpreter import mend

mend()

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
STRONGEST, PER_UNIT = tl.constexpr(chunking.STRONGEST), tl.constexpr(chunking.PER_UNIT)

# -- in kernels


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, acc=None):
    """`a @ b (+ acc)`, accumulated in float32.

    Triton 3.8's interpreter multiplies the bit patterns of bfloat16 numbers; there the operands are widened first,
    which gives what matrix units give.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def dot_split(a, b, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """`a @ b`, the inner axis shared out in SPLIT parts, which are added up.

    Triton gives the warps of a product different rows of it. With 16 rows, all it needs of one chunk in float32, every
    warp would hold all of both operands, twice; here it holds those of its own part.
    """
    if SPLIT == 1:
        return dot(a, b, PRECISION)
    else:
        part: tl.constexpr = a.shape[1] // SPLIT
        left = tl.permute(tl.reshape(a, [a.shape[0], SPLIT, part]), [1, 0, 2])
        return tl.sum(dot(left, tl.reshape(b, [SPLIT, part, b.shape[1]]), PRECISION), 0)


@triton.jit
def dot_turned(a, b, PRECISION: tl.constexpr, TURNED: tl.constexpr, acc):
    """`a @ b + acc`; or, TURNED, the transpose of it, with that of acc: the warps then take different columns of b."""
    if TURNED:
        return dot(tl.trans(b), tl.trans(a), PRECISION, acc)
    else:
        return dot(a, b, PRECISION, acc)


@triton.jit
def load_tile(pointer, stride, row, rows, col, cols):
    """Tile of a matrix whose column stride is 1; zero outside `rows` x `cols`."""
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    return tl.load(pointer + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, stride, row, rows, col, cols, value):
    """Store a tile within `rows` x `cols`, in the dtype of the memory."""
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(pointer + row[:, None] * stride + col[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_column(pointer, stride, row, rows, GIVEN: tl.constexpr, default: tl.constexpr):
    """Vector in float32, one number per token; zero beyond `rows`, and `default` throughout where not given."""
    if GIVEN:
        return tl.load(pointer + row * stride, mask=row < rows, other=0.0).to(tl.float32)
    else:
        return tl.full(row.shape, default, tl.float32)


@triton.jit
def summed(step):
    """Sums of the log decays of a chunk's tokens, in two parts each: see `two_parts` of `chunking.py`.

    Returns the two parts of the sum up to each token, then in one number the sum over the later tokens, and over all.
    """
    step = tl.where(step < STRONGEST, STRONGEST, step)  # no maximum, which GPUs take without its NaN
    coarse = tl.floor(step * PER_UNIT + 0.5) / PER_UNIT
    fine = step - coarse
    coarse_sum, fine_sum = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    coarse_all, fine_all = tl.sum(coarse, 0), tl.sum(fine, 0)
    return coarse_sum, fine_sum, (coarse_all - coarse_sum) + (fine_all - fine_sum), coarse_all + fine_all


@triton.jit
def between(coarse, fine, seen, TURNED: tl.constexpr):
    """The decay exp(sum of later row - sum of earlier column), (C, C), from the parts of `summed`; 0 where not `seen`.

    TURNED: of later column and earlier row.
    """
    # The mask goes in before exp: pairs the other way round have positive differences.
    if TURNED:
        sums = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
    else:
        sums = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.exp(tl.where(seen, sums, float("-inf")))


@triton.jit
def tokens_of(cu, row, length):
    """Where the tokens of a row are: the factor of batch strides, the first among all tokens, and how many there are.

    With offsets cu of sequences (`packing.py`) row is one of them; batch strides are then those of tokens (`strides`).
    """
    if cu is None:
        return row, row * length, length
    else:
        first = tl.cast(tl.load(cu + row), tl.int64)
        return first, first, tl.cast(tl.load(cu + row + 1) - first, tl.int32)


@triton.jit
def slots_of(cu, row, h, heads, slots, T):
    """The first slot of a row and head among those (B, H, slots) of T tokens, or (1, H, slots) of sequences."""
    if cu is None:
        return (row * heads + h) * slots
    else:
        return h * slots + tl.cast(tl.load(cu + row), tl.int64) // T + row


@triton.jit
def part_of(cu, owner, slot, slots, T):
    """The row of a slot among those of all rows (B, slots), and which part of its tokens it is."""
    if cu is None:
        return tl.cast(slot // slots, tl.int64), slot % slots
    else:
        row = tl.cast(tl.load(owner + slot), tl.int64)
        return row, slot - tl.cast(tl.load(cu + row) // T + row, tl.int32)


@triton.jit
def load_documents(index, start, row, length, C: tl.constexpr):
    """Documents of the tokens of the chunk at `start`, of the token before it, and of its last token.

    `index` points at the row of the batch element; tokens beyond `length` are in no document (-1).
    """
    here = tl.load(index + start + row, mask=start + row < length, other=-1)
    before = tl.load(index + tl.maximum(start - 1, 0))
    before = tl.where(start > 0, before, 0)  # the initial state belongs to document 0
    last = tl.load(index + tl.minimum(start + C, length) - 1)
    return here, before, last


# -- on the host


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that q, k and v are cast to for the kernels."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def rows(x: Tensor) -> Tensor:
    """`x` itself when its last axis is contiguous (kernels take the other strides), else a copy.

    Broadcast axes (stride 0) come from gradients of sums and are copied, too: a kernel may not rely on them.
    """
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def strides(x: Tensor | None, count: int = 3, *, cu: Tensor | None = None) -> tuple[int, ...]:
    """The first strides of `x`, zeros when there is none; with offsets cu that of the batch is that of tokens."""
    if x is None:
        return (0,) * count
    return x.stride()[:count] if cu is None else (x.stride(1), *x.stride()[1:count])


def block(size: int, largest: int = 1 << 30) -> int:
    """A power of two that covers `size`, at least 16 (what tl.dot needs) and at most `largest`."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def levels(chunk: int) -> int:
    """How often a chunk of tokens, a power of two, is halved until single tokens are left."""
    return chunk.bit_length() - 1


def on_nvidia() -> bool:
    """Whether kernels are compiled for a chip of NVIDIA's. The interpreter counts as one."""
    if knobs.runtime.interpret:
        return True
    target: Any = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda"


def warp_size() -> int:
    """Lanes of a warp; 32 in the interpreter."""
    if knobs.runtime.interpret:
        return 32
    target: Any = triton.runtime.driver.active.get_current_target()
    return target.warp_size


def few_lanes() -> bool:
    """Whether the chip is one of AMD's with warps of 32 lanes (gfx1100), where those of its other chips have 64."""
    return not on_nvidia() and warp_size() == 32


def warps(count: int) -> int:
    """`count` warps; twice as many where there are `few_lanes`: tiles are then in the registers of as many threads."""
    return 2 * count if few_lanes() else count


def allows_tf32() -> bool:
    """Whether PyTorch's own products of float32 matrices on GPUs may use TF32 or less.

    There are two ways to say so, and once the newer one was taken, asking by the older one raises.
    """
    settings: Any = torch.backends
    if hasattr(settings.cuda.matmul, "fp32_precision"):  # since torch 2.9, where the older way sets this, too
        own = settings.cuda.matmul.fp32_precision
        return (settings.fp32_precision if own == "none" else own) not in ("ieee", "none")
    return torch.get_float32_matmul_precision() != "highest"


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: to about 2^-22 or better, unless PyTorch's own products may use TF32.

    NVIDIA's matrix units have no float32: three TF32 products stand in for one. Without them, operands are in registers
    as a whole, which are spilled by thousands of bytes. For other dtypes, and on AMD's chips, most of which do not
    compile anything else, it is "ieee", which means the product of what is there.
    """
    if dtype != torch.float32 or INTERPRETED.value or not on_nvidia():
        return "ieee"
    return "tf32" if allows_tf32() else "tf32x3"


def inner_precision(dtype: torch.dtype) -> str:
    """`precision` of products of float32 tiles that a kernel made itself, from inputs of `dtype`.

    For bfloat16 TF32 has digits to spare. It has the digits of float16, but a chain of products, as in a triangular
    solve, loses some of them.
    """
    if dtype == torch.bfloat16 and on_nvidia() and not INTERPRETED.value:
        return "tf32"
    return precision(torch.float32)


def halving(dtype: torch.dtype) -> int:
    """By what tiles of float32 are narrower, so that they stay in registers: numbers take twice the room, and for each
    of the three products in one an operand is taken apart (`precision`)."""
    return 2 if dtype == torch.float32 else 1


def splits(k: Tensor) -> int:
    """Into how many parts products over all keys are split (`dot_split`): in float32, 16 keys each."""
    return block(k.shape[-1]) // 16 if k.dtype == torch.float32 else 1


def given(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """What a kernel gets as pointer: `x`, or any tensor in its place, which the kernel then does not read."""
    return stand_in if x is None else x

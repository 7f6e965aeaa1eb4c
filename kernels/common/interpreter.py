"""What Triton's interpreter (looked at in Triton 3.6 and 3.8) lacks for tests.

*Speed.* It evaluates `tl.associative_scan` with a custom combine function one number at a time, about 0.2 ms each: a
scan over a tile of 64 x 64 takes a second. `vectorize_scans` replaces that loop by one over positions of the scanned
axis, each for all lines at once. The combine function sees the same operands in the same order.

*Rounding.* It cuts numbers off where it casts to bfloat16, which doubles the error and gives it a direction; GPUs round
to the nearest, ties to even. `round_casts` mends that.

*Counters of loops.* A number is an array of one element, and NumPy 2.5 refuses `int` of such an array, which Triton 3.6
calls for a loop's end. `index_numbers` mends that.

*Order of imports.* `TRITON_INTERPRET=1` counts when a kernel is defined; but parts of `tl` (zeros, sum, sigmoid ...)
are kernels, too, defined when triton is imported, which torchvision does. `interpret_standard_library` turns them over.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
from triton import knobs


def mend() -> None:
    """All of the first three. Every module with kernels imports one that calls this."""
    vectorize_scans()
    round_casts()
    index_numbers()


def vectorize_scans() -> None:
    """Let interpreted scans combine whole slices. Does nothing where kernels are compiled, or when done already."""
    if not knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    original_scan()
    setattr(interpreter.ScanOps, "generic_scan", _generic_scan)  # noqa: B010 - to a type checker a method is fixed


@functools.cache
def original_scan():
    """Triton's own scan, which `vectorize_scans` replaces."""
    from triton.runtime import interpreter

    return interpreter.ScanOps.generic_scan


def _generic_scan(self, operands):
    data = [np.moveaxis(x.handle.data, self.axis, 0) for x in operands]
    results = [np.empty_like(d) for d in data]
    accumulated = None
    for i in range(data[0].shape[0]):
        current = tuple(self.to_tensor(d[i], x.dtype) for d, x in zip(data, operands, strict=True))
        if accumulated is not None:
            current = self.combine_fn.fn(*accumulated, *current)
            current = current if isinstance(current, tuple) else (current,)
        for result, value in zip(results, current, strict=True):
            result[i] = value.handle.data
        accumulated = current
    return [self.to_tensor(np.moveaxis(r, 0, self.axis), x.dtype) for r, x in zip(results, operands, strict=True)]


def round_casts() -> None:
    """Let interpreted casts to bfloat16 round. Does nothing where kernels are compiled, or when done already."""
    if not knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    original_cast()
    setattr(interpreter.InterpreterBuilder, "cast_impl", _cast)  # noqa: B010 - as above


@functools.cache
def original_cast():
    """Triton's own cast, which `round_casts` replaces."""
    from triton.runtime import interpreter

    return interpreter.InterpreterBuilder.cast_impl


def _cast(self, source, dtype):
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if dtype.scalar != tl.bfloat16:
        return original_cast()(self, source, dtype)
    # Integers and float64 come this way, too: the original takes them for bit patterns. Like PyTorch, through float32.
    return TensorHandle(_bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32 numbers, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    # Just under half of the last place, and one more where the number is odd. A carry goes into the exponent, rightly.
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x7FC0, rounded).astype(np.uint16)


def index_numbers() -> None:
    """Let interpreted numbers be ends of loops. Does nothing where kernels are compiled, or when done already."""
    if not knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    original_patch()
    setattr(interpreter, "_patch_lang_tensor", _patch_tensor)  # noqa: B010 - as above


@functools.cache
def original_patch():
    """What Triton puts into its tensors while a kernel is interpreted."""
    from triton.runtime import interpreter

    return interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope):
    original_patch()(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def interpret_standard_library() -> None:
    """Make `TRITON_INTERPRET=1` work although it was set after triton was imported, but before our kernels were."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted: dict[int, InterpretedFunction] = {}
    owners = [m for name, m in list(sys.modules.items()) if name.split(".")[:2] == ["triton", "language"]]
    for owner in [*owners, tl.tensor]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, JITFunction):
                setattr(owner, name, interpreted.setdefault(id(value), InterpretedFunction(value.fn)))

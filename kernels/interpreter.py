"""Makes Triton's interpreter fast enough for tests.

The interpreter (of Triton 3.8) evaluates `tl.associative_scan` with a custom combine function one number at a time,
about 0.2 ms each: a scan over a tile of 64 x 64 takes a second. `vectorize_scans` replaces that loop by one over
positions of the scanned axis, each for all lines at once. The combine function sees the same operands in the same order.
"""

from __future__ import annotations

import numpy as np
import triton


def vectorize_scans() -> None:
    """Let interpreted scans combine whole slices. Does nothing where kernels are compiled, or when done already."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    interpreter.ScanOps.generic_scan = _generic_scan


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

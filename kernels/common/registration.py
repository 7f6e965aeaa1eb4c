"""How an op of `kernels/` is made known to PyTorch, and the conventions that all ops share.

*Files.* `kernels/<op>/` holds `__init__.py` (public functions), `reference.py`, `eager.py`, `triton.py` and `cases.py`.
The public function imports its backend lazily, inside the function body (`from .triton import pool_mix_triton`): the
package then needs no triton, and a test can put a broken copy of the module in its place.

*Registration.* Opaque loops (eager paths) and Triton launches become `torch.library` custom operators through
`register_op`, with a fake and, where there is a gradient, an autograd formula: `torch.compile(fullgraph=True)` then has
no graph break and `torch.library.opcheck` passes. Custom operators and not `triton_op`: the latter refuses interpreted
kernels, so that it could not be tested without a GPU. Rules that opcheck enforces: type annotations on every argument
(`Tensor`, `Tensor | None`, `int`, `float`, `bool`, `str`), no output may be an input or a view of one, no input is
written to, and an output that is not wanted is an empty tensor rather than None. The host code looks at shapes, never
at values, since the compile-only driver of `tools.build` launches nothing.

*Kernels.* Decorate with `@triton.autotune(configs=configs(...), key=[...])`, `configs` from `autotune.py`: the first
config is the default one (no spills, tested), and the only one in the interpreter. Or, without autotune, pass constants
from the host. Accumulate in float32, `tl.cast` for scalars, int64 offsets, no float atomics.

*Cases.* `kernels/<op>/cases.py` holds `CASES`, a `Case` (`selftest/case.py`) for each public function: how it is called
at small, odd and model sizes, and what that must cost. The self-test runs it, `tools.build` compiles, `tools.traffic`
counts what it launches, `benchmarks.kernels` times it, and the roofline in `docs/kernels.md` is made of it.

*Tests.* See `tests/kernels/utils.py`. Triton runs in its interpreter there (`tests/conftest.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_namespace = "mixerzoo"

# Full name of an operator, `mixerzoo::NAME` -> what it was registered with: counting FLOPs looks into it.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def library_namespace(name: str) -> Iterator[None]:
    """Register into another namespace meanwhile. Lets tests import a mutated copy of a kernel module."""
    global _namespace
    before, _namespace = _namespace, name
    try:
        yield
    finally:
        _namespace = before


def register_op(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Make `implementation` the custom operator `mixerzoo::<name>`.

    Args:
        name: unique name, e.g. `"selective_scan_triton"`.
        implementation: takes annotated tensors and numbers, returns a tensor or a tuple of tensors.
        fake: the same signature; returns empty tensors of the right shape, dtype and strides.
        save: `save(ctx, inputs, output)` for the gradient (`ctx.save_for_backward`); needed with `backward`.
        backward: `backward(ctx, *grads)`, one gradient (or None) for each input. It may call another registered op.
        flops: `flops(*shapes, out_shape=..., **kwargs) -> int`, matmul flops for `torch.utils.flop_counter`, which
            cannot look into the operator; shapes stand in the place of tensors.

    Returns:
        the operator, to be called like `implementation`.
    """
    op = torch.library.custom_op(f"{_namespace}::{name}", implementation, mutates_args=())
    op.register_fake(fake)
    IMPLEMENTATIONS[f"{_namespace}::{name}"] = implementation
    if backward is not None:
        op.register_autograd(backward, setup_context=save)
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(op._opoverload.overloadpacket)(flops)
    return op

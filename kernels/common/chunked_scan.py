"""Host code of the chunked scans on Triton (`ssd`, `gla`, `delta_rule`): their operators and how they are called.

Each is an operator `(q, k, v, *gates, scale, initial, index) -> (y, final)` with a second one for the gradients.

B batch, L length, H heads, G groups, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .documents import document_index
from .registration import register_op
from .tiles import check_sizes

Scan = Callable[..., tuple[Tensor, Tensor]]


def dense(x: Tensor | None) -> Tensor | None:
    """`x` contiguous, or None."""
    return None if x is None else x.contiguous()


def like(v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for the gradient of each input; an empty tensor for one that is not there."""
    return tuple(v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def last_state(k: Tensor, v: Tensor) -> Tensor:
    """Memory for the state (B, H, K, V) after the last token, in float32."""
    return v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), last_state(k, v)


def _backward_fake(dy: Tensor, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, _, initial, _ = args
    return like(args[2], *inputs, initial)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.scale, initial, index = inputs
    ctx.save_for_backward(*tensors, initial, index)


def register_scan(name: str, forward: Scan, backward: Callable[..., tuple[Tensor, ...]]) -> Scan:
    """Make a scan the operators `<name>_triton` and `<name>_triton_backward`.

    Args:
        name: of the op.
        forward: `(q, k, v, *gates, scale, initial, index) -> (y, final)`; gates, initial and index may be None.
        backward: `(dy, d_final, *the same) -> a gradient for each tensor and for initial`, as `like` allots them.

    Returns:
        the operator of the forward pass.
    """
    gradients = register_op(f"{name}_triton_backward", backward, _backward_fake)

    def gradient(ctx: Any, dy: Tensor, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, initial, index = ctx.saved_tensors
        *grads, d_initial = gradients(dy, d_final, *inputs, ctx.scale, initial, index)
        grads = [None if x is None else dx for x, dx in zip(inputs, grads, strict=True)]
        return *grads, None, None if initial is None else d_initial, None

    return register_op(f"{name}_triton", forward, _forward_fake, save=_save, backward=gradient)


def run_scan(
    op: str,
    operator: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor | None, ...],
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the operator of `op` on inputs of any floating dtypes; y has the dtype of v, the state is in float32."""
    dtype = check_sizes(op, k.shape[3], q, k, v)
    index = None if document_ids is None else document_index(document_ids)
    initial = None if initial_state is None else initial_state.float()
    y, state = operator(q.to(dtype), k.to(dtype), v.to(dtype), *gates, scale, initial, index)
    return y.to(v.dtype), state

"""Host code of the chunked scans on Triton (`ssd`, `gla`, `delta_rule`): their operators and how they are called.

Each is an operator `(q, k, v, *gates, scale, initial, index, cu) -> (y, final)` with a second one for the gradients.

B batch, L length, H heads, G groups, K key size, V value size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .packing import document_index, slot_owners
from .registration import empties, register_op
from .tiles import common_dtype

Scan = Callable[..., tuple[Tensor, Tensor]]


def dense(x: Tensor | None) -> Tensor | None:
    """`x` contiguous, or None."""
    return None if x is None else x.contiguous()


def like(v: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for the gradient of each input; an empty tensor for one that is not there."""
    return empties(*inputs)


def rows_of(v: Tensor, cu: Tensor | None) -> int:
    """Rows that have a state: those of the batch, or sequences."""
    return v.shape[0] if cu is None else len(cu) - 1


def owners(cu: Tensor | None, v: Tensor, size: int) -> Tensor | None:
    """`slot_owners` of slots of `size` tokens, where there are sequences."""
    return None if cu is None else slot_owners(cu, v.shape[1], size)


def last_state(k: Tensor, v: Tensor, cu: Tensor | None) -> Tensor:
    """Memory for the state (B, H, K, V) after the last token, in float32; (S, H, K, V) of sequences."""
    return v.new_empty(rows_of(v, cu), v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), last_state(k, v, rest[-1])


def _wide(forward: Scan) -> Scan:
    """States of float16 overflow where nothing decays, and products read them as they are: computed in float32."""

    @functools.wraps(forward)
    def run(*args: Any) -> tuple[Tensor, Tensor]:
        y, final = forward(*map(_widened, args))
        return y.to(args[2].dtype), final

    return run


def _wide_gradients(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    @functools.wraps(backward)
    def run(*args: Any) -> tuple[Tensor, ...]:
        *tensors, _, initial, _, _ = args[2:]
        grads = backward(*map(_widened, args))
        return tuple(dx if x is None else dx.to(x.dtype) for x, dx in zip((*tensors, initial), grads, strict=True))

    return run


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x


def register_scan(name: str, forward: Scan, backward: Callable[..., tuple[Tensor, ...]]) -> Scan:
    """Make a scan the operators `<name>_triton` and `<name>_triton_backward`.

    Args:
        name: of the op.
        forward: `(q, k, v, *gates, scale, initial, index, cu) -> (y, final)`; all after the gates but scale, and gates,
            may be None. index: (B, L) document of each token; cu: (S + 1,) offsets of sequences, both int32.
        backward: `(dy, d_final, *the same) -> a gradient for each tensor and for initial`, as `like` allots them.

    Returns:
        the operator of the forward pass.
    """
    names = " ".join(x for x in inspect.signature(forward).parameters if x not in ("scale", "index", "cu"))
    gradients = register_op(f"{name}_triton_backward", _wide_gradients(backward), names)
    return register_op(
        f"{name}_triton", _wide(forward), _forward_fake, outputs="y _final", gradient=gradients, wrt=names
    )


def run_scan(
    operator: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor | None, ...],
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call an operator on inputs of any floating dtypes; y has the dtype of v, the state is in float32."""
    dtype = common_dtype(q, k, v)
    index = None if document_ids is None else document_index(document_ids)
    initial = None if initial_state is None else initial_state.float()
    cu = None if cu_seqlens is None else cu_seqlens.int()
    y, state = operator(q.to(dtype), k.to(dtype), v.to(dtype), *gates, scale, initial, index, cu)
    return y.to(v.dtype), state

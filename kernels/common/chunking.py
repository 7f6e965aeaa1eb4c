"""What the chunked scans share: argument checks, cutting the time axis into chunks, and carrying states.

Axis letters: B batch, L length, H heads, G groups of heads, K key size (state rows), V value size (state columns),
n chunks, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import ConfigError


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that scans compute and keep states in: float32, or float64 when an input is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int | None, ...], letters: str) -> None:
    """Raise unless `tensor` is None or has this shape (None: any size); `letters` name the axes in the message."""
    if tensor is None:
        return
    if tensor.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be ({letters}) = ({wanted}).")


def check_documents(op: str, document_ids: Tensor | None, batch: int, length: int) -> None:
    """Raise unless `document_ids` is None or an integer tensor (B, L)."""
    check_shape(op, "document_ids", document_ids, (batch, length), "B, L")
    if document_ids is not None and (document_ids.is_floating_point() or document_ids.is_complex()):
        raise ConfigError(f"{op}: document_ids must be integers, not {document_ids.dtype}.")


def pad_time(x: Tensor, length: int) -> Tensor:
    """Append zeros to axis 1 up to `length`."""
    extra = length - x.shape[1]
    return x if extra == 0 else torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, extra))


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`, keeping only its inputs for the backward pass, which runs it again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def carry_states(update: Tensor, decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk of S_{i+1} = decay_i S_i + update_i, and the last one.

    Args:
        update: (B, n, ...), what each chunk adds.
        decay: broadcastable to `update`, with the axes B and n in full.
        initial: (B, ...), the state before the first chunk.

    Returns:
        states (B, n, ...) before each chunk, and the state (B, ...) after the last.

    A loop over chunks is one pass over memory. Past 64 chunks it runs over blocks of about sqrt(n) chunks, all blocks
    at once, then over the blocks, so that the number of steps (and the graph that torch.compile unrolls) stays small.
    """
    chunks = update.shape[1]
    if chunks <= 64:
        states = [initial]
        # unbind, not indexing: the gradient of an index is a tensor as long as the sequence, once per chunk
        for added, factor in zip(update.unbind(1), decay.unbind(1), strict=True):
            states.append(torch.addcmul(added, factor, states[-1]))
        return torch.stack(states[:-1], 1), states[-1]
    block = int(chunks**0.5)
    blocks = -(-chunks // block)
    tail = blocks * block - chunks
    if tail:
        update = torch.cat([update, update.new_zeros(update.shape[0], tail, *update.shape[2:])], 1)
        decay = torch.cat([decay, decay.new_ones(decay.shape[0], tail, *decay.shape[2:])], 1)
    update = update.unflatten(1, (blocks, block))
    decay = decay.unflatten(1, (blocks, block))
    local, total = carry_states(
        update.flatten(0, 1), decay.flatten(0, 1), torch.zeros_like(update[:, 0, 0]).repeat_interleave(blocks, 0)
    )
    product = torch.cat([torch.ones_like(decay[:, :, :1]), decay.cumprod(2)], 2)
    starts, last = carry_states(total.unflatten(0, (-1, blocks)), product[:, :, -1], initial)
    states = torch.addcmul(local.unflatten(0, (-1, blocks)), product[:, :, :-1], starts.unsqueeze(2))
    return states.flatten(1, 2)[:, :chunks], last

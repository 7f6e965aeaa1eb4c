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

from .dispatch import at_most, wants_plain

LARGEST_KEY = 256  # the state of a program, K x 64 in float32, must fit its registers


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that scans compute and keep states in: float32, or float64 when an input is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def keys_limit(q: Tensor, k: Tensor, *_: Any) -> str | None:
    """Why the Triton path of a scan or of attention does not take keys of this size, or None."""
    return at_most(LARGEST_KEY, "keys of up to {}", k.shape[-1])


def pad_time(x: Tensor, length: int) -> Tensor:
    """Append zeros to axis 1 up to `length`."""
    extra = length - x.shape[1]
    return x if extra == 0 else torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, extra))


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`, keeping only its inputs for the backward pass, which runs it again."""
    if not torch.is_grad_enabled() or wants_plain():  # transforms and tracing don't know checkpoints
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

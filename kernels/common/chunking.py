"""What the chunked scans share: argument checks, cutting the time axis into chunks, and carrying states.

Axis letters: B batch, L length, H heads, G groups of heads, K key size (state rows), V value size (state columns),
n chunks, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .dispatch import at_most, is_exporting

STRONGEST = -8192.0  # log of a decay that is 0 in float64, too
PER_UNIT = 32.0  # 64 tokens of 8192 in steps of 1 / 32 are 2^24 steps: float32 counts so far
LARGEST_KEY = 256  # the state of a program, K x 64 in float32, must fit its registers


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that scans compute and keep states in: float32, or float64 when an input is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def scan_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What a scan of (B, L, H, V) values returns, y and the last state (B or S, H, K, V), without values.

    The last argument are the offsets of S sequences, or None.
    """
    dtype = compute_dtype(q, k, v, *(x for x in rest if isinstance(x, Tensor)))
    rows = v.shape[0] if rest[-1] is None else rest[-1].shape[0] - 1
    return v.new_empty(v.shape), v.new_empty(rows, v.shape[2], k.shape[3], v.shape[3], dtype=dtype)


def keys_limit(q: Tensor, k: Tensor, *_: Any) -> str | None:
    """Why the Triton path of a scan or of attention does not take keys of this size, or None."""
    return at_most(LARGEST_KEY, "keys of up to {}", k.shape[-1])


def first_tokens(y: Tensor, length: int) -> Tensor:
    """The inverse of `pad_time`. The exporter does not see that the padded length is the larger one, for a slice."""
    return y.index_select(1, torch.arange(length, device=y.device)) if is_exporting() else y[:, :length]


def chunk_size(length: int, largest: int) -> int:
    """Tokens of a chunk, fewer where the sequence is shorter; an exported program takes sequences of all lengths."""
    return largest if is_exporting() else min(largest, max(length, 1))


def chunk_count(length: int, chunk: int) -> int:
    """Chunks of a sequence, the last of which may be longer than what is left.

    In an exported program at least two: PyTorch tells sizes of 1 from all others, and there are no two programs.
    """
    return (length + (2 * chunk - 1 if is_exporting() else chunk - 1)) // chunk


def pad_time(x: Tensor, length: int) -> Tensor:
    """Append zeros to axis 1 up to `length`."""
    extra = length - x.shape[1]
    if not is_exporting() and extra == 0:
        return x
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, extra))


def two_parts(g: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays as the sum of two tensors, the first of which is summed without error.

    A decay between two tokens is a difference of sums. Beside one strong decay (a reset of -1e4, say) a sum in one
    number has lost the digits of all mild ones. The first part is a multiple of 1 / `PER_UNIT` and at least
    `STRONGEST`, whose decay is 0 in any format: a chunk of 64 of them is exact in float32. The second is at most half
    of such a step, so that its sums stay near 1. Gradients go through the second.
    """
    g = torch.where(g < STRONGEST, STRONGEST, g)
    coarse = (g.detach() * PER_UNIT).round() / PER_UNIT
    return coarse, g - coarse


def sums_of(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays of chunks from their log decays (..., c), without loss of digits (`two_parts`).

    Returns the logarithms of the decay from the chunk's start to each token (..., c), from each token to the chunk's
    end (..., c), through the chunk (...), and from token s to token t (..., t, s), which is only meant where s <= t.
    """
    coarse, fine = two_parts(g)
    coarse, fine = coarse.cumsum(-1), fine.cumsum(-1)
    until = coarse + fine
    after = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    pairs = (fine[..., :, None] - fine[..., None, :]) + (coarse[..., :, None] - coarse[..., None, :])
    return until, after, until[..., -1], pairs


def fold(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """Run `state, kept = step(state, *part)` over axis 0 of all parts; the last state and what was kept, stacked.

    For `torch.export`: one node for any number of parts, where a loop in Python is for one number. `step` must not
    return one of its arguments.
    """

    def body(carried: Tensor, part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        after, kept = step(carried, *part)
        return _packed(after), kept  # the strides of states must stay

    return scan(body, _packed(state), parts)


def _packed(state: Tensor) -> Tensor:
    """With the strides of its shape. `contiguous` leaves those along an axis of length 1 as they are, so a batch of one
    is viewed anew; a batch of any size is not, as the exporter would fix it.
    """
    state = state.contiguous()
    return state.view(-1).view(state.shape) if statically_known_true(state.shape[0] == 1) else state


def carry_states(update: Tensor, decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk of S_{i+1} = decay_i S_i + update_i, and the last one.

    Args:
        update: (B, n, ...), what each chunk adds.
        decay: broadcastable to `update`, with the axes B and n in full.
        initial: (B, ...), the state before the first chunk.

    Returns:
        states (B, n, ...) before each chunk, and the state (B, ...) after the last.

    A loop over chunks is one pass over memory. Past 64 chunks it runs over blocks of about sqrt(n) chunks, all blocks
    at once, then over the blocks, so that the number of steps stays small.
    """
    if is_exporting():
        last, states = fold(
            lambda state, added, factor: (torch.addcmul(added, factor, state), state.clone()),
            initial, update.transpose(0, 1), decay.transpose(0, 1),
        )  # fmt: skip
        return states.transpose(0, 1), last
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

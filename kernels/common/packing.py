"""Several texts in one row of tokens: the two ways to say where they begin, shared by every recurrent op.

*Documents.* `document_ids` (B, L): a change of value between neighbours starts a document, at which a state is
forgotten; the same id may come back later without joining the two. Token 0 starts nothing: it continues
`initial_state`. The state after the last token is that of the last document.

*Sequences.* `cu_seqlens` (S + 1,): sequence r is the tokens cu[r] to cu[r + 1] of the one row (B = 1). Each has its own
initial and its own final state, also one without tokens. Sequences are the rows of a batch whose lengths differ, and
so the kernels take them: program (row, part of it) looks up where its row begins and ends.

*Slots.* A row of n tokens is cut into parts of T tokens. Sequence r has the slots from cu[r] // T + r on: as many as it
can need, at least one, and L // T + S in all. So every size is known without looking at the offsets, and nothing waits
for a device.

B batch, L tokens, S sequences, T tokens of a slot, n slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError

# -- documents


def document_starts(document_ids: Tensor) -> Tensor:
    """(B, L) ids -> (B, L) bool, True where a document starts and the state is therefore forgotten."""
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_index(document_ids: Tensor) -> Tensor:
    """(B, L) ids -> (B, L) int32, the number of documents that started up to each token; unique for each document."""
    return document_starts(document_ids).cumsum(1, dtype=torch.int32)


def padded_index(document_ids: Tensor) -> Tensor:
    """`document_index`, with numbers below 0 for tokens whose id is negative: padding, which is in no document."""
    index = document_index(document_ids)
    return torch.where(document_ids < 0, -1 - index, index)


# -- sequences


def check_sequences(op: str, x: Tensor, cu_seqlens: Tensor | None, document_ids: Tensor | None) -> str:
    """Hold offsets against tokens x (B, L, ...); return how many rows of states there are, as `check_shapes` reads it.

    Raises:
        ConfigError: several rows, documents as well, no integers, or, where the offsets are on the CPU, values that do
            not rise from 0 to the number of tokens.
    """
    if cu_seqlens is None:
        return "B"
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}".removeprefix("torch.")
        raise ConfigError(f"{op}: cu_seqlens must be offsets (S + 1,) in int32 or int64, not {kind}.")
    if document_ids is not None:
        raise ConfigError(f"{op}: cu_seqlens and document_ids exclude each other: a document is a sequence of its own.")
    batch, length = x.shape[:2]
    if batch != 1:
        raise ConfigError(f"{op}: cu_seqlens cuts one row of tokens, the inputs have {batch}: join them, B = 1.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu_seqlens) is Tensor:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ConfigError(f"{op}: cu_seqlens={ends} does not rise from 0 to the {length} tokens.")
    return str(len(cu_seqlens) - 1)


def in_direction(
    run: Callable[..., tuple[Tensor, Tensor]],
    reverse: bool,
    tokens: tuple[Tensor | None, ...],
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run(*tokens, initial_state, document_ids, cu_seqlens)` -> y (B, L, ...), states; `reverse`: last token first.

    From the right, a packed row is one whose sequences come in the opposite order, and so do their states.
    """
    if not reverse:
        return run(*tokens, initial_state, document_ids, cu_seqlens)

    def flip(x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else x.flip(axis)

    *turned, documents = (flip(x, 1) for x in (*tokens, document_ids))
    if cu_seqlens is None:
        y, state = run(*turned, initial_state, documents, None)
        return y.flip(1), state
    y, state = run(*turned, flip(initial_state, 0), None, cu_seqlens[-1] - cu_seqlens.flip(0))
    return y.flip(1), state.flip(0)


def by_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    cu_seqlens: Tensor,
    tokens: tuple[Tensor | None, ...],
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition: every sequence by itself. `run(*tokens, initial_state)` gives y (1, n, ...) and a state (1, ...).

    Args:
        run: as said.
        cu_seqlens: (S + 1,).
        tokens: tensors (1, L, ...).
        initial_state: (S, ...).
    """
    found = [
        run(
            *(None if x is None else x[:, start:end] for x in tokens),
            None if initial_state is None else initial_state[r : r + 1],
        )
        for r, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
    ]
    return torch.cat([y for y, _ in found], 1), torch.cat([state for _, state in found])


def count_slots(cu_seqlens: Tensor | None, batch: int, length: int, size: int) -> int:
    """Slots of `size` tokens: of every row of the batch, or of all sequences."""
    return -(-length // size) if cu_seqlens is None else length // size + len(cu_seqlens) - 1


def first_slots(cu_seqlens: Tensor, size: int) -> Tensor:
    """(S + 1,) int64, the first slot of each sequence, and behind them their number."""
    return cu_seqlens.long() // size + torch.arange(len(cu_seqlens), device=cu_seqlens.device)


def slot_owners(cu_seqlens: Tensor, length: int, size: int) -> Tensor:
    """(n,) int32: the sequence of every slot."""
    slots = torch.arange(count_slots(cu_seqlens, 1, length, size), device=cu_seqlens.device)
    return (torch.searchsorted(first_slots(cu_seqlens, size)[:-1], slots, right=True) - 1).int()


class Chunks(NamedTuple):
    """A packed row laid out in whole chunks, where every sequence begins a chunk (`in_chunks`).

    owner, opens: (n,) the sequence of a chunk, and whether it begins there. last: (S,) the last chunk of a sequence.
    take, real: (n T,) the token of each place, and whether there is one. back: (L,) the place of each token.
    """

    owner: Tensor
    opens: Tensor
    last: Tensor
    take: Tensor
    real: Tensor
    back: Tensor

    def lay(self, x: Tensor) -> Tensor:
        """(1, L, ...) -> (1, n T, ...), 0 where there is no token."""
        return torch.where(self.real.view(-1, *([1] * (x.ndim - 2))), x.index_select(1, self.take), 0)

    def before(self, initial: Tensor, owner: Tensor) -> Tensor:
        """The initial states (S, ...) of some chunks' sequences."""
        return initial.index_select(0, owner.long())


def in_chunks(cu_seqlens: Tensor, length: int, size: int) -> Chunks:
    """Lay out a packed row of `length` tokens in chunks of `size`."""
    cu = cu_seqlens.long()
    first = first_slots(cu, size)
    owner = slot_owners(cu, length, size).long()
    slots = torch.arange(len(owner), device=cu.device)
    token = (cu[owner] + (slots - first[owner]) * size)[:, None] + torch.arange(size, device=cu.device)
    real = token < cu[owner + 1][:, None]
    tokens = torch.arange(length, device=cu.device)
    row = torch.searchsorted(cu[1:], tokens, right=True)
    return Chunks(
        owner,
        slots == first[owner],
        first[1:] - 1,
        torch.where(real, token, 0).flatten(),
        real.flatten(),
        first[row] * size + tokens - cu[row],
    )


def carry_sequences(
    carry: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    update: Tensor,
    decay: Tensor,
    initial: Tensor,
    chunks: Chunks,
) -> tuple[Tensor, Tensor]:
    """`carry_states` over the chunks of several sequences, from `initial` (S, ...); the last states are (S, ...)."""
    ends = torch.cat([chunks.opens[1:], chunks.opens.new_zeros(1)])  # what follows is another sequence
    follower = torch.cat([chunks.owner[1:], chunks.owner[-1:]])
    shape = (1, -1, *([1] * (update.ndim - 2)))
    begun = torch.where(ends.view(shape), chunks.before(initial, follower)[None], update)
    starts, _ = carry(begun, torch.where(ends.view(shape), 0.0, decay), initial[:1])
    kept = [x.index_select(1, chunks.last)[0] for x in (update, decay, starts)]
    return starts, torch.addcmul(kept[0], kept[1], kept[2])

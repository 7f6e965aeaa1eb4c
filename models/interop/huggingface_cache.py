"""The state of a language model as transformers' generation handles it: reordered by beams, rolled back by drafts.

Axis letters: B batch, N tokens.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...mixers.state import map_state, reorder_state
from ..backbones.language import LanguageState


class _Call(NamedTuple):
    """state: before the call; ids, mask: (B, N) of the call."""

    state: LanguageState | None
    ids: Tensor
    mask: Tensor | None


class MixerZooCache:
    """The state after some tokens, `cache` of a call with `use_cache`.

    Recurrent states cannot be cut back. Where drafts are tried (assisted and prompt-lookup decoding) the cache keeps
    the state before each call; `crop` goes back to it and leaves the accepted tokens of that call in `pending`, which
    the next call reads together with its own.

    Attributes:
        state: after `length - pending` tokens; None at the start.
        length: tokens so far, padding and pending ones included.
        pending: (ids, mask) of tokens that the next call reads first; None for none.
    """

    is_compileable = False
    is_croppable = True
    is_linear = (True,)

    def __init__(self) -> None:
        self.state: LanguageState | None = None
        self.length = 0
        self.pending: tuple[Tensor, Tensor | None] | None = None
        self._calls: deque[_Call] | None = None
        self._is_user_defined = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.length

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs from now on."""
        if self._calls is None:
            self._calls = deque(maxlen=128)

    def begin(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, LanguageState | None]:
        """What a call has to read: its tokens after the pending ones, and the state before them."""
        self.length += ids.shape[1]
        if self.pending is not None:
            before, before_mask = self.pending
            if mask is not None or before_mask is not None:
                whole = [torch.ones_like(i, dtype=torch.bool) if m is None else m for i, m in
                         ((before, before_mask), (ids, mask))]  # fmt: skip
                mask = torch.cat(whole, 1)
            ids, self.pending = torch.cat([before, ids], 1), None
        state = self.state
        if self._calls is not None:
            # the mixers may change a state in place
            self._calls.append(_Call(map_state(torch.clone, state), ids, mask))
        return ids, mask, state

    def crop(self, count: int) -> None:
        """Take back the last `-count` tokens; with a positive count, all but the first `count`. 0 takes none back.

        Raises:
            RuntimeError: more than was recorded.
        """
        remove = -count if count <= 0 else self.length - count
        self.length -= max(0, remove)
        while remove > 0:
            if self.pending is not None:
                ids, mask = self.pending
                left = ids.shape[1] - remove
                self.pending = (ids[:, :left], None if mask is None else mask[:, :left]) if left > 0 else None
                remove = max(0, -left)
                continue
            if not self._calls:
                raise RuntimeError("the cache has not recorded so many tokens; activate_past_recording comes first")
            call = self._calls.pop()
            self.state, self.pending = call.state, (call.ids, call.mask)
        if self._calls is not None and self.pending is None:
            self._calls.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows of the batch."""
        self.state = reorder_state(self.state, beam_idx)
        if self.pending is not None:
            self.pending = reorder_state(self.pending, beam_idx)
        if self._calls is not None:
            self._calls.clear()

    def reorder(self, beam_idx: Tensor) -> MixerZooCache:
        """As `reorder_cache`, in a new cache."""
        other = MixerZooCache()
        other.__dict__.update(self.__dict__)
        other.reorder_cache(beam_idx)
        return other

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(self.state.length.shape[0], device=self.state.length.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Back to the start."""
        self.__init__()

    def __deepcopy__(self, memo: Any) -> MixerZooCache:
        other = MixerZooCache()
        other.__dict__.update(map_state(torch.clone, self.__dict__))
        return other

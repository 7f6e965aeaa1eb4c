"""A block that drops the tokens to which the class token attends least. Sparsifiner (2023), arXiv:2303.13755.

Axis letters: B batch, N tokens without the class token, C channels, H heads.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...mixers.positions import without_padding
from ...schema import Share
from .blocks import BLOCKS, BlockOptions, Kept, MetaFormerBlock, scaled_sum


@BLOCKS.register("token_pruning")
class TokenPruningBlock(MetaFormerBlock):
    """A MetaFormer block after which ceil(token_keep_rate * N) tokens and the class token are left.

    What is left travels beside the tokens, as a mask: no token attends to a pruned one, which stays a row of zeros.
    What the class token gives to every token, averaged over heads, decides which tokens stay; the choice has no
    gradient.

    Args:
        dim: channels C; the mixer gives the attention of a class token, as `sparsifiner` with `class_token: true` does.
        token_keep_rate: part of the N tokens that is left after this block, counted from all N; 1 prunes none.
        diluted: as in the official code, the class token still attends to tokens that were pruned before, with logit
            and value 0, which thins out what it reads.
        common: see `Block`.

    Raises:
        OptionError: another mixer.
    """

    axes = (1,)
    masks = True
    prunes = True
    tried_with = {"name": "sparsifiner", "class_token": True, "reduce_n_factor": 2}
    alternatives = {"token_keep_rate": 0.5}
    inert = frozenset({"diluted"})  # without tokens pruned before

    def __init__(
        self, dim: int, *, token_keep_rate: Share = 1.0, diluted: bool = False, **common: Unpack[BlockOptions]
    ) -> None:
        mixer = common["mixer"]
        if not (mixer.gives_attention and mixer.class_token):
            raise OptionError(
                "",
                f'"token_pruning" ranks tokens by the attention of a class token; it needs a mixer that gives it, such '
                f'as sparsifiner with class_token=true, not "{mixer.name}".',
            )
        super().__init__(dim, **common)
        self.token_keep_rate, self.diluted = token_keep_rate, diluted

    def forward(  # type: ignore[override] - a block that prunes gives the mask, too
        self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Kept:
        """Tokens `(B, 1 + N, C)` to the same shape; `mask` `(B, 1 + N)`, True for those that are left."""
        if document_ids is not None:
            raise ConfigError("document_ids: the block token_pruning cannot honour them.")
        attention = None
        if self.token_keep_rate < 1:
            y, attention = self.mixer(self.norm1(x), mask=mask, diluted=self.diluted, token_attention=True)
        else:
            y = self.mixer(self.norm1(x), mask=mask, diluted=self.diluted)
        x = scaled_sum(x, self.drop_path(y), self.res_scale1, self.layer_scale1)
        if self.channel_mixer is not None:
            x = self.channel_half(x, mask=mask)
        if attention is not None:
            mask = self.narrowed(mask, attention.detach().mean(1))
        return Kept(without_padding(x, mask), mask)

    def narrowed(self, mask: Tensor | None, attention: Tensor) -> Tensor:
        """The mask `(B, 1 + N)` of those that are left, by what the class token gives to each, `(B, 1 + N)`."""
        before = torch.ones_like(attention, dtype=torch.bool) if mask is None else mask
        score = attention[:, 1:].masked_fill(~before[:, 1:], -math.inf)
        index = score.topk(math.ceil(self.token_keep_rate * score.shape[1]), -1).indices
        kept = torch.zeros_like(before[:, 1:]).scatter(1, index, torch.ones_like(index, dtype=torch.bool))
        return torch.cat([before[:, :1], kept & before[:, 1:]], 1)

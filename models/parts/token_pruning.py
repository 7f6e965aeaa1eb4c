"""A block that drops the tokens to which the class token attends least. Sparsifiner (2023), arXiv:2303.13755.

Axis letters: B batch, N tokens without the class token, C channels, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...mixers.attention.sparsifiner import Sparsifiner
from ...schema import Share
from .blocks import BLOCKS, BlockOptions, MetaFormerBlock, scaled_sum


@BLOCKS.register("token_pruning")
class TokenPruningBlock(MetaFormerBlock):
    """A MetaFormer block after which ceil(token_keep_rate * N) tokens and the class token are left.

    A pruned token is a row of zeros. By that the next block knows it, so no mask travels beside the tokens: no token
    attends to it, and it stays zero. What the class token gives to every token, averaged over heads, decides
    which tokens stay; the choice has no gradient.

    Args:
        dim: channels C; the mixer is a `sparsifiner` with `class_token: true`.
        token_keep_rate: part of the N tokens that is left after this block, counted from all N; 1 prunes none.
        diluted: as in the official code, the class token still attends to tokens that were pruned before, with logit
            and value 0, which thins out what it reads.
        common: see `Block`.

    Raises:
        OptionError: another mixer.
    """

    def __init__(
        self, dim: int, *, token_keep_rate: Share = 1.0, diluted: bool = False, **common: Unpack[BlockOptions]
    ) -> None:
        mixer = common["mixer"]
        if not isinstance(mixer, Sparsifiner) or not mixer.class_token:
            raise OptionError(
                "",
                f'"token_pruning" ranks tokens by the attention of a class token; it needs the mixer '
                f'sparsifiner with class_token=true, not "{mixer.name}".',
            )
        super().__init__(dim, **common)
        self.token_keep_rate, self.diluted = token_keep_rate, diluted

    def halves(self) -> list[Callable[..., Tensor]]:
        """Refused: an average of earlier layers would fill the zeros that mark what was pruned."""
        raise ConfigError("block: token_pruning marks tokens by zeros; it needs average_layers=false.")

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Tokens `(B, 1 + N, C)` to the same shape; `mask` `(B, 1 + N)` in place of the rows of zeros."""
        if document_ids is not None:
            raise ConfigError("block: token_pruning cannot honour document_ids.")
        alive = (x != 0).any(-1) if mask is None else mask
        assert isinstance(self.mixer, Sparsifiner)
        prunes = self.token_keep_rate < 1
        y, attention = self.mixer.attend(self.norm1(x), alive, diluted=self.diluted, token_attention=prunes)
        x = scaled_sum(x, self.drop_path(y), self.res_scale1, self.layer_scale1)
        if self.channel_mixer is not None:
            branch = self.channel_mixer(self.second_norm(x), mask=alive)
            x = scaled_sum(x, self.drop_path(branch), self.res_scale2, self.layer_scale2)
        if attention is not None:
            patches = x.shape[1] - 1
            score = attention.detach().mean(1)[:, 1:].masked_fill(~alive[:, 1:], -math.inf)
            index = score.topk(math.ceil(self.token_keep_rate * patches), -1).indices
            kept = torch.zeros_like(alive[:, 1:]).scatter(1, index, torch.ones_like(index, dtype=torch.bool))
            alive = torch.cat([alive[:, :1], kept & alive[:, 1:]], 1)
        return x * alive[:, :, None]

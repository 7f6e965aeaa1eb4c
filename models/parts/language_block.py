"""The MetaFormer block on sequences, with padding, packed documents and streaming.

Axis letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor
from torch.nn import functional as F

from ...errors import OptionError
from ...schema import Probability
from .blocks import BlockOptions, MetaFormerBlock, scaled_sum


class LanguageBlock(MetaFormerBlock):
    """`x <- x + mix(norm1(x)); x <- x + mlp(norm2(x))` ("pre"), or `norm1(x + mix(x))` and so on ("post", as in BERT).

    Args:
        dim, common: see `Block`.
        norm_placement: "pre" or "post".
        dropout: probability after each branch.
    """

    alternatives = {"norm_placement": "post", "dropout": 0.5}

    def __init__(
        self,
        dim: int,
        *,
        norm_placement: Literal["pre", "post"] = "pre",
        dropout: Probability = 0.0,
        **common: Unpack[BlockOptions],
    ) -> None:
        if common.get("res_scale") is not None:
            raise OptionError("res_scale", "blocks of language models have no scale of their identity paths.")
        super().__init__(dim, **common)
        self.post = norm_placement == "post"
        self.dropout = dropout

    def _add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        if self.dropout and self.training:
            branch = F.dropout(branch, self.dropout)
        return scaled_sum(x, self.drop_path(branch), None, scale)

    def _finish(
        self, x: Tensor, mixed: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """What follows the token mixer."""
        x = self._add(x, mixed, self.layer_scale1)
        if self.post:
            x = self.norm1(x)
        if self.channel_mixer is None:
            return x
        branch = self.channel_mixer(x if self.post else self.second_norm(x), mask=mask, document_ids=document_ids)
        x = self._add(x, branch, self.layer_scale2)
        return self.second_norm(x) if self.post else x

    def _before(self, x: Tensor) -> Tensor:
        return x if self.post else self.norm1(x)

    def _extra(self, embeddings: Tensor | None, token_ids: Tensor | None) -> dict[str, Tensor]:
        """The embeddings, normed as this block's input is, and the ids, for mixers that read them."""
        extra = {}
        if embeddings is not None and self.mixer.reads_embeddings:
            extra["embeddings"] = self._before(embeddings)
        if token_ids is not None and self.mixer.reads_ids:
            extra["token_ids"] = token_ids
        return extra

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        token_ids: Tensor | None = None,
        stream: Literal["prefill", "step"] | None = None,
        state: Any = None,
    ) -> Any:
        """Whole sequences `(B, N, C)` to the same shape.

        With `stream` the block decodes, by its mixer's method of that name, and gives the state after it, too. Both
        ways are calls of the module, so that hooks see them.
        """
        extra = self._extra(embeddings, token_ids)
        if stream == "step":
            mixed, state = self.mixer.step(self._before(x), state, **extra)
        elif stream == "prefill":
            mixed, state = self.mixer.prefill(self._before(x), mask=mask, state=state, **extra)
        else:
            if document_ids is not None:
                extra["document_ids"] = document_ids
            mixed = self.mixer(self._before(x), mask=mask, **extra)
            return self._finish(x, mixed, mask=mask, document_ids=document_ids)
        return self._finish(x, mixed, mask=mask if stream == "prefill" else None), state

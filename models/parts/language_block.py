"""The MetaFormer block on sequences, with padding, packed documents and streaming.

Axis letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...mixers import Mixer
from .blocks import MetaFormerBlock, scaled_sum


class LanguageBlock(MetaFormerBlock):
    """`x <- x + mix(norm1(x)); x <- x + mlp(norm2(x))` ("pre"), or `norm1(x + mix(x))` and so on ("post", as in BERT).

    Args:
        dim: channels C.
        mixer: the token mixer, built.
        norm: norm by name or mapping.
        norm_placement: "pre" or "post".
        channel_mixer: channel mixer by name or mapping; None leaves the second half out, as in Mamba.
        dropout: probability after each branch.
        drop_path: probability that a sample skips a branch in training.
        layer_scale: initial value of the learnable scale of each branch, None for no scale.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Mixer,
        norm: Any = "rms_norm",
        norm_placement: str = "pre",
        channel_mixer: Any = "gated_mlp",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        key: str = "block",
    ) -> None:
        super().__init__(
            dim, mixer=mixer, norm=norm, channel_mixer=channel_mixer, layer_scale=layer_scale, drop_path=drop_path,
            key=key,
        )  # fmt: skip
        self.post = norm_placement == "post"
        self.dropout = dropout

    def _add(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        if self.dropout and self.training:
            branch = F.dropout(branch, self.dropout)
        return scaled_sum(x, self.drop_path(branch), None, scale)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the token mixer; acts on every token alone."""
        x = self._add(x, mixed, self.layer_scale1)
        if self.post:
            x = self.norm1(x)
        if self.channel_mixer is None:
            return x
        x = self._add(x, self.channel_mixer(x if self.post else self.norm2(x)), self.layer_scale2)
        return self.norm2(x) if self.post else x

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
    ) -> Tensor:
        extra = self._extra(embeddings, token_ids)
        if document_ids is not None:
            extra["document_ids"] = document_ids
        return self._finish(x, self.mixer(self._before(x), mask=mask, **extra))

    def prefill(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: Any = None,
        embeddings: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """See `Mixer.prefill`."""
        extra = self._extra(embeddings, token_ids)
        mixed, state = self.mixer.prefill(self._before(x), mask=mask, state=state, **extra)
        return self._finish(x, mixed), state

    def step(
        self, x_t: Tensor, state: Any, *, embeddings: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """See `Mixer.step`."""
        mixed, state = self.mixer.step(self._before(x_t), state, **self._extra(embeddings, token_ids))
        return self._finish(x_t, mixed), state

"""The block of GFNet and AFNO: one residual around token mixer and channel mixer, with a norm before each.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from torch import Tensor

from .block_variants import SerialBlock
from .blocks import BLOCKS, Make, scaled_sum


@BLOCKS.register("single_skip")
class SingleSkipBlock(SerialBlock):
    """`x <- r x + l mlp(norm(mix(norm1(x))))`. GFNet: Rao et al. (2021), arXiv:2107.00645."""

    def arrange(self, make: Make) -> None:
        super().arrange(make)
        self.norm1 = make.norm()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        mixed = self.mixer(self.norm1(x), mask=mask, **packed)
        branch = self.channel_mixer(self.norm(mixed), mask=mask, document_ids=document_ids)
        return scaled_sum(x, self.drop_path(branch), self.res_scale, self.layer_scale)

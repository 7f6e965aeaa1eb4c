"""The block of GFNet and AFNO: one residual around token mixer and channel mixer, with a norm before each.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...mixers import Mixer
from .block_variants import SerialBlock
from .blocks import BLOCKS, scaled_sum
from .norms import NORMS


@BLOCKS.register("single_skip")
class SingleSkipBlock(SerialBlock):
    """`x <- r x + l mlp(norm(mix(norm1(x))))`. GFNet: Rao et al. (2021), arXiv:2107.00645.

    Args:
        dim, mixer, norm, channel_mixer, layer_scale, res_scale, drop_path, key: as of `MetaFormerBlock`.

    Raises:
        ConfigError: no channel mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Mixer,
        norm: Any = "layer_norm",
        channel_mixer: Any = "mlp",
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        key: str = "block",
    ) -> None:
        super().__init__(
            dim,
            mixer=mixer,
            norm=norm,
            channel_mixer=channel_mixer,
            layer_scale=layer_scale,
            res_scale=res_scale,
            drop_path=drop_path,
            key=key,
        )
        self.norm1 = NORMS.build(norm, dim, key=f"{key}.norm")

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        mixed = self.mixer(self.norm1(x), mask=mask, **packed)
        branch = self.channel_mixer(self.norm(mixed))
        return scaled_sum(x, self.drop_path(branch), self.res_scale, self.layer_scale)

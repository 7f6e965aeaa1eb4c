"""The controls: no mixing, random mixing, and average pooling.

Axis letters: B batch, N tokens, C channels, H height, W width, T frames. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from torch import Tensor

from .base import Mixer


class Identity(Mixer, name="identity"):
    """No mixing at all: the block keeps its norm, residual and channel mixer. IdentityFormer (2022), arXiv:2210.13452.

    A control: what a model scores with this mixer, its backbone scores alone.
    """

    causal = "can"
    masks = True
    packs = True
    streams = True
    complexity = "1"
    memory = "1"
    source = "MetaFormer Baselines for Vision (2022), arXiv:2210.13452"

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        self.is_causal = causal

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return x

    def init_state(self, batch: int, *, device=None, dtype=None) -> tuple[()]:
        return ()

    def step(self, x_t: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return x_t, state

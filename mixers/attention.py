"""Softmax attention.

Axis letters: B batch, N tokens, C channels, H heads, D channels per head. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import Mixer


class Attention(Mixer, name="attention"):
    """Multi-head softmax attention over all tokens of a grid. Vaswani et al. (2017), arXiv:1706.03762.

    `y = proj(softmax(q k^T / sqrt(head_dim)) v)`. The width of the heads is free of `dim`, as in MetaFormer Baselines
    (2022, arXiv:2210.13452): `num_heads * head_dim` may differ from `dim`. CAFormer uses the defaults; a ViT uses
    `head_dim=64, qkv_bias=True, proj_bias=True`.

    Args:
        dim: number of channels C.
        num_heads: number of heads H; by default `max(1, dim // head_dim)`.
        head_dim: channels per head D.
        qkv_bias: bias of the projection to queries, keys and values.
        proj_bias: bias of the output projection.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool, False tokens are never attended to. The
    rows of `qkv.weight` are ordered (3, H, D).

    Raises:
        ConfigError: a size that is not positive.
    """

    masks = True
    complexity = "N^2"
    memory = "N"
    source = "Attention Is All You Need (2017), arXiv:1706.03762"
    alternatives = {"num_heads": 2, "head_dim": 16}

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 32,
        qkv_bias: bool = False,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        if head_dim < 1:
            raise ConfigError(f"attention.head_dim: {head_dim} is not a positive number of channels per head.")
        if num_heads is not None and num_heads < 1:
            raise ConfigError(f"attention.num_heads: {num_heads} is not a positive number of heads.")
        self.num_heads = max(1, dim // head_dim) if num_heads is None else num_heads
        self.head_dim = head_dim
        width = self.num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim, bias=proj_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02 and zero biases, as in ViT and MetaFormer Baselines."""
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.check_grid(x)
        tokens = x.flatten(1, -2)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        visible = None
        if mask is not None:
            mask = mask.flatten(1)
            # a sample without any real token sees everything: no row of the softmax is empty, so no NaN
            visible = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.proj(y.transpose(1, 2).flatten(2)).reshape(x.shape)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's and sail-sg's MetaFormer attention: same names and layouts, `(3, H, D)` rows of `qkv.weight`."""
        return {name: tensor for name, tensor in state_dict.items() if name.startswith(("qkv.", "proj."))}

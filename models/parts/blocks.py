"""The MetaFormer block. Yu et al. (2021), arXiv:2111.11418.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...mixers import Mixer
from ...schema import Parts
from .channel_mixers import CHANNEL_MIXERS
from .norms import NORMS

BLOCKS = Parts(
    "block", __name__, reserved=("norm", "mixer", "channel_mixer", "layer_scale", "res_scale", "drop_path", "key")
)


class DropPath(nn.Module):
    """Zero for a random part of the samples in training; the others are scaled so that the mean stays.

    Stochastic depth, Huang et al. (2016), arXiv:1603.09382. timm has the same; its layers cannot be imported without
    all of its models, which costs every user a second.

    Args:
        drop_prob: probability that a sample of the batch, the first axis, is dropped.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Probabilities of `depth` blocks, from 0 of the first one to `last`."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def scaled_sum(x: Tensor, branch: Tensor, res_scale: Tensor | None, layer_scale: Tensor | None) -> Tensor:
    """`res_scale * x + layer_scale * branch`, where None stands for 1."""
    if layer_scale is not None:
        if res_scale is None:
            return torch.addcmul(x, branch, layer_scale)
        branch = branch * layer_scale
    return x + branch if res_scale is None else torch.addcmul(branch, x, res_scale)


@BLOCKS.register("metaformer")
class MetaFormerBlock(nn.Module):
    """`x <- r1 x + l1 mix(norm1(x)); x <- r2 x + l2 mlp(norm2(x))`, on `(B, *grid, C)`.

    Args:
        dim: channels C.
        mixer: the token mixer, built.
        norm: norm by name or mapping.
        channel_mixer: channel mixer by name or mapping; None leaves the second half out.
        layer_scale: initial value of the learnable scale l of each branch, None for no scale.
        res_scale: initial value of the learnable scale r of each identity path, None for no scale.
        drop_path: probability that a sample skips a branch in training.
        key: path of the configuration, for messages.
        channel_norm: norm of the second half, where it is not `norm`.
        shared_norm: one norm, with the same weights, for both halves.
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
        channel_norm: Any = None,
        shared_norm: bool = False,
    ) -> None:
        super().__init__()
        if shared_norm and channel_norm is not None:
            raise ConfigError(f"{key}.channel_norm: it cannot be given with shared_norm.")

        def scale(value: float | None) -> nn.Parameter | None:
            return None if value is None else nn.Parameter(torch.full((dim,), float(value)))

        self.norm1 = NORMS.build(norm, dim, key=f"{key}.norm")
        self.mixer = mixer
        self.layer_scale1, self.res_scale1 = scale(layer_scale), scale(res_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.channel_mixer = None
        if channel_mixer is not None:
            other = norm if channel_norm is None else channel_norm
            self.norm2 = None if shared_norm else NORMS.build(other, dim, key=f"{key}.norm")
            self.channel_mixer = CHANNEL_MIXERS.build(channel_mixer, dim, key=f"{key}.channel_mixer")
            self.layer_scale2, self.res_scale2 = scale(layer_scale), scale(res_scale)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        x = self.token_half(x, mask=mask, document_ids=document_ids)
        return x if self.channel_mixer is None else self.channel_half(x)

    def halves(self) -> list[Callable[..., Tensor]]:
        """The token mixing and, where there is one, the channel mixing, each with its residual."""
        return [self.token_half] if self.channel_mixer is None else [self.token_half, self.channel_half]

    def token_half(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        branch = self.mixer(self.norm1(x), mask=mask, **packed)
        return scaled_sum(x, self.drop_path(branch), self.res_scale1, self.layer_scale1)

    def channel_half(self, x: Tensor) -> Tensor:
        assert self.channel_mixer is not None
        branch = self.channel_mixer((self.norm1 if self.norm2 is None else self.norm2)(x))
        return scaled_sum(x, self.drop_path(branch), self.res_scale2, self.layer_scale2)


def init_weights(root: nn.Module, std: float | None = 0.02) -> None:
    """Truncated-normal weights and zero biases for the linear and convolution layers outside of the mixers.

    `std=None` takes `fan_in ** -0.5` for each layer. The usual 0.02 suits widths of several hundred channels; in a
    narrow model it starts every branch near zero, and a short run never leaves that.

    Mixers own their initial values: re-initialising them here would ruin a comparison unseen.
    """
    for child in root.children():
        if isinstance(child, Mixer):
            continue
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.trunc_normal_(child.weight, std=child.weight[0].numel() ** -0.5 if std is None else std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        init_weights(child, std)


def outer_mixers(root: nn.Module) -> list[Mixer]:
    """The mixers in a model, without those inside of another one, which takes care of them."""
    found: list[Mixer] = []
    for child in root.children():
        found += [child] if isinstance(child, Mixer) else outer_mixers(child)
    return found


def no_weight_decay(root: nn.Module) -> set[str]:
    """Names of the parameters of a model that take no weight decay: all vectors, and what its mixers name."""
    names = {name for name, parameter in root.named_parameters() if parameter.ndim <= 1}
    for prefix, module in root.named_modules():
        if isinstance(module, Mixer):
            own = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
            names = (names - own) | {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return names

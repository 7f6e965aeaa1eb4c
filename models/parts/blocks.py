"""The MetaFormer block. Yu et al. (2021), arXiv:2111.11418.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers import Mixer
from ...mixers.part import Part
from ...schema import Between, Fraction, Parts, Probability
from .channel_mixers import CHANNEL_MIXERS
from .norms import NORMS

LayerScale = Annotated[float, Between(0, 100)]
InitStd = Annotated[float, Between(0, 10, above=True)]

BLOCKS = Parts("block", __name__, reserved=("norm", "mixer", "channel_mixer", "layer_scale", "res_scale", "drop_path"))


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


class BlockOptions(TypedDict, total=False):
    """What every block takes; see `Block`."""

    mixer: Required[Mixer]
    norm: Any
    channel_mixer: Any
    layer_scale: LayerScale | None
    res_scale: Fraction | None
    drop_path: Probability


class Make(NamedTuple):
    """What a block is put together from; each call makes a new norm, channel mixer or scale, or None for no such."""

    mixer: Mixer
    norm: Callable[[], nn.Module]
    channel_mixer: Callable[[], nn.Module | None]
    layer_scale: Callable[[], nn.Parameter | None]
    res_scale: Callable[[], nn.Parameter | None]
    drop_path: Callable[[], nn.Module]


def _scale(value: float | None, dim: int) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


def _channel_mixer(spec: Any, dim: int) -> nn.Module | None:
    return None if spec is None else CHANNEL_MIXERS.build(spec, dim, key="channel_mixer")


class Kept(NamedTuple):
    """What a block with `prunes` gives: its tokens, zeros where one is dropped; and the mask of those left, or None."""

    x: Tensor
    mask: Tensor | None


class Block(nn.Module, Part):
    """Base of the blocks: a token mixer, and what stands around it. A subclass gives `arrange` and `forward`.

    `forward(x, *, mask=None, document_ids=None)`; both go to the mixers. What tokens, samples and padding do to each
    other is the mixers' and the norms' business: a block adds nothing.

    Class data, besides that of a `Part`:
        needs_channel_mixer: there is no such block without one.
        prunes: the block drops tokens: it takes the mask of those that are left, and gives a `Kept`.
        tried_with: the token mixer that the contract tries the block with.

    Args:
        dim: channels C.
        mixer: the token mixer, built.
        norm: norm by name or mapping.
        channel_mixer: channel mixer by name or mapping; None leaves it out.
        layer_scale: initial value of the learnable scale of each branch, None for no scale.
        res_scale: initial value of the learnable scale of each identity path, None for no scale.
        drop_path: probability that a sample skips a branch in training.

    Raises:
        OptionError: no channel mixer in a block with `needs_channel_mixer`.
    """

    needs_channel_mixer: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    tried_with: ClassVar[Any] = "attention"

    def __init__(
        self,
        dim: int,
        *,
        mixer: Mixer,
        norm: Any = "layer_norm",
        channel_mixer: Any = "mlp",
        layer_scale: LayerScale | None = None,
        res_scale: Fraction | None = None,
        drop_path: Probability = 0.0,
    ) -> None:
        super().__init__()
        if channel_mixer is None and self.needs_channel_mixer:
            raise OptionError("channel_mixer", "this block needs a channel mixer.")
        self.dim = dim
        self.initial_scales = {"layer_scale": layer_scale, "res_scale": res_scale}
        self.arrange(
            Make(
                mixer,
                partial(NORMS.build, norm, dim, key="norm"),
                partial(_channel_mixer, channel_mixer, dim),
                partial(_scale, layer_scale, dim),
                partial(_scale, res_scale, dim),
                partial(DropPath, drop_path) if drop_path > 0 else nn.Identity,
            )
        )

    def reset_parameters(self) -> None:
        """The scales of the branches and of the identity paths; norms and mixers have their own."""
        for name, parameter in self.named_parameters(recurse=False):
            value = self.initial_scales.get(name.rstrip("12"))
            assert value is not None, name
            nn.init.constant_(parameter, value)

    def arrange(self, make: Make) -> None:
        """Set the modules and scales, in the order in which weights are drawn."""
        raise NotImplementedError


@BLOCKS.register("metaformer")
class MetaFormerBlock(Block):
    """`x <- r1 x + l1 mix(norm1(x)); x <- r2 x + l2 mlp(norm2(x))`, on `(B, *grid, C)`.

    Args:
        dim, common: see `Block`.
        channel_norm: norm of the second half, where it is not `norm`.
        shared_norm: one norm, with the same weights, for both halves.
    """

    alternatives = {"channel_norm": "rms_norm"}

    def __init__(
        self, dim: int, *, channel_norm: Any = None, shared_norm: bool = False, **common: Unpack[BlockOptions]
    ) -> None:
        if shared_norm and channel_norm is not None:
            raise OptionError("channel_norm", "it cannot be given with shared_norm.")
        self.channel_norm, self.shared_norm = channel_norm, shared_norm
        super().__init__(dim, **common)

    def arrange(self, make: Make) -> None:
        self.norm1 = make.norm()
        self.mixer = make.mixer
        self.layer_scale1, self.res_scale1 = make.layer_scale(), make.res_scale()
        self.drop_path = make.drop_path()
        channel_mixer = make.channel_mixer()
        if channel_mixer is None:
            self.channel_mixer = None
            return
        if self.shared_norm:
            self.norm2 = None
        elif self.channel_norm is None:
            self.norm2 = make.norm()
        else:
            self.norm2 = NORMS.build(self.channel_norm, self.dim, key="channel_norm")
        self.channel_mixer = channel_mixer
        self.layer_scale2, self.res_scale2 = make.layer_scale(), make.res_scale()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        x = self.token_half(x, mask=mask, document_ids=document_ids)
        return x if self.channel_mixer is None else self.channel_half(x, mask=mask, document_ids=document_ids)

    def second_norm(self, x: Tensor) -> Tensor:
        """The norm of the second half, which may be that of the first."""
        return (self.norm1 if self.norm2 is None else self.norm2)(x)

    def halves(self) -> list[Callable[..., Tensor]]:
        """The token mixing and, where there is one, the channel mixing, each with its residual."""
        return [self.token_half] if self.channel_mixer is None else [self.token_half, self.channel_half]

    def token_half(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        branch = self.mixer(self.norm1(x), mask=mask, **packed)
        return scaled_sum(x, self.drop_path(branch), self.res_scale1, self.layer_scale1)

    def channel_half(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        assert self.channel_mixer is not None
        branch = self.channel_mixer(self.second_norm(x), mask=mask, document_ids=document_ids)
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

"""What the vision backbones share: timm's conventions around stages of blocks.

Axis letters: B batch, T frames, H height, W width, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from ...errors import ConfigError, OptionError, under
from ...mixers import Grid, Mixer
from ..parts.blocks import init_weights, no_weight_decay
from ..parts.depth_averaging import layers_of
from ..parts.heads import Head


def check_image_size(size: Any, *, key: str) -> tuple[int, int]:
    """One number or two as (height, width).

    Raises:
        ConfigError: something else, or not positive.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise OptionError(key, f"{size!r} is not a size; give one positive number or [height, width].")
    return pair


def taken_stages(stages: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Stages to give maps of, counted from 0, and the last one of them.

    Args:
        stages: how many there are.
        indices: some of them, negative ones counted from the end; a number of last ones; None for all.

    Raises:
        ConfigError: a stage that is not there.
    """
    count = stages if indices is None else indices
    wanted = list(range(stages - count, stages)) if isinstance(count, int) else [i + stages * (i < 0) for i in count]
    if not wanted or not all(0 <= i < stages for i in wanted):
        raise ConfigError(f"indices: {indices!r} is not among the model's {stages} stages.")
    return wanted, max(wanted)


@dataclass
class Carried:
    """What travels beside the tokens from stage to stage.

    Attributes:
        paths: what stages lead past others, the oldest first.
        mask: the tokens that are left `(B, *grid)` where blocks drop some; None for all.
    """

    paths: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None


class VisionBackbone(nn.Module):
    """Base of the models of images and clips. Maps `(B, C_in, H, W)` to logits `(B, K)`; channels-last inside.

    With `frames` in its configuration a model takes clips `(B, C_in, T, H, W)`, and its maps have the axis T too.
    With a head for dense prediction it gives `(B, K, H, W)`.

    Follows timm: `forward_features`, `forward_head`, `forward_intermediates`, `reset_classifier`, `get_classifier`,
    `num_features`, `feature_info`, `set_grad_checkpointing`, `no_weight_decay`. A subclass gives `embed`,
    `stage_forward`, `stages` and `mixers_with_grids`.
    """

    config_class: ClassVar[type]
    head: Head
    stages: Any  # nn.ModuleList, whose elements a type checker does not know

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.num_classes: int = config.num_classes
        self.in_chans: int = config.in_chans
        self.num_features = self.head_hidden_size = 0
        self.feature_info: list[dict[str, Any]] = []
        self.grad_checkpointing = False

    # -- what a subclass gives

    def embed(self, x: Tensor) -> Tensor:
        """Image `(B, C_in, H, W)` to the first tokens, channels last."""
        raise NotImplementedError

    def stage_forward(self, index: int, x: Tensor, carried: Carried) -> Tensor:
        """Tokens through one stage; `carried`, empty before the first, is brought up to date in place."""
        raise NotImplementedError

    def mixers_with_grids(self, image_size: int | tuple[int, int]) -> list[tuple[Mixer, Grid]]:
        """Every mixer with the grid that it sees for images of this size."""
        raise NotImplementedError

    def map_of(self, x: Tensor) -> Tensor:
        """Tokens as a map `(B, C, H, W)`, of a clip `(B, C, T, H, W)`."""
        return x.movedim(-1, 1)

    def finish(self, x: Tensor) -> Tensor:
        """What stands after the last stage and before the head."""
        return x

    # -- shared

    def init_weights(self) -> None:
        """Initial values of everything but the mixers, which own theirs."""
        init_weights(self, self.config.init_std)

    def run_layer(self, layer: Callable[..., Any], x: Tensor) -> Any:
        """Tokens through a block or half of one, with recomputation in backward where it is on."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting()
        return checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)

    def run_blocks(self, stage: Any, x: Tensor, carried: Carried | None = None) -> Tensor:
        """Tokens through the blocks of a stage.

        Args:
            stage: with `blocks` and, where earlier layers are averaged, `average`.
            x: the tokens.
            carried: what the layers so far gave, where an average is taken of them; and the tokens that are left.
        """
        carried = Carried() if carried is None else carried
        if stage.average is not None:
            if not carried.paths:
                carried.paths.append(x)
            return stage.average(layers_of(stage.blocks), x, carried.paths, self.run_layer)
        for block in stage.blocks:
            out = self.run_layer(block if carried.mask is None else partial(block, mask=carried.mask), x)
            x, carried.mask = out if getattr(block, "prunes", False) else (out, carried.mask)
        return x

    def tokens(self, x: Tensor) -> Tensor:
        """Images `(B, C_in, H, W)` to the last tokens, channels last."""
        x = self.embed(self.checked(x))
        carried = Carried()
        for i in range(len(self.stages)):
            x = self.stage_forward(i, x, carried)
        return self.finish(x)

    def checked(self, x: Tensor) -> Tensor:
        """The images or clips that came in.

        Raises:
            ConfigError: another shape.
        """
        if isinstance(x, Proxy):  # of torch.fx, which knows no shapes
            return x
        frames = self.config.frames
        known = [self.in_chans] if frames is None else [self.in_chans, frames]
        if x.ndim != len(known) + 3 or list(x.shape[1:-2]) != known:
            kind, axis = ("images", "") if frames is None else ("clips", f"{frames}, ")
            raise ConfigError(
                f"{kind} must have the shape (batch, {self.in_chans}, {axis}height, width), not {tuple(x.shape)}."
            )
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, `(B, C, H, W)`; tokens `(B, N, C)` where there is a class token."""
        return self.map_of(self.tokens(x))

    def unmap(self, x: Tensor) -> Tensor:
        """Inverse of `map_of`."""
        return x.movedim(1, -1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives, to logits `(B, K)` or, with `pre_logits`, to features `(B, C)`."""
        y = self.head(self.unmap(x), pre_logits=pre_logits)
        return y if self.head.pool else self.map_of(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.head.maps:
            maps: Any = self.forward_intermediates(x, self.head.maps, intermediates_only=True, output_fmt="NHWC")
            return self.head(maps, size=x.shape[-2:]).movedim(-1, 1)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the stages of the given indices (all by default), and the last map.

        Args:
            x: images `(B, C_in, H, W)`.
            indices: stage indices, or a number of last stages.
            norm: apply what stands after the last stage to each map.
            stop_early: leave out the stages after the last index.
            output_fmt: "NCHW" or "NHWC", with T before H for clips.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ConfigError(f'output_fmt="{output_fmt}" is not known. Allowed: NCHW, NHWC.')
        take, last = taken_stages(len(self.stages), indices)
        shown: list[Tensor] = []
        size = (x.shape[-2], x.shape[-1])
        carried = Carried()
        x = self.embed(self.checked(x))
        for i in range(len(self.stages) if not stop_early else last + 1):
            x = self.stage_forward(i, x, carried)
            if i in take:
                y = self.map_without_token(self.finish(x) if norm else x, size)
                shown.append(y if output_fmt == "NCHW" else y.movedim(1, -1))
        return shown if intermediates_only else (self.map_of(self.finish(x)), shown)

    def map_without_token(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Tokens of an image of the given size as a map `(B, C, H, W)`, without a class token."""
        return self.map_of(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given features do not need; returns the stage indices."""
        take, last = taken_stages(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        if prune_norm:
            self.head.norm = None
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc  # type: ignore[return-value]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A fresh classifier; `global_pool` also changes the pooling, `reset_other` removes the head's norm."""
        self.num_classes = num_classes
        like = next(self.parameters())
        if global_pool is not None:
            with under("head"):
                self.head.set_pool(global_pool)
        if reset_other:
            self.head.norm = None
        self.head.reset(num_classes)
        init_weights(self.head, self.config.init_std)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.compile`, by default without the layout pass of torch's compiler.

        Where a convolution follows, that pass lays every map out as if its second axis were the channels. Tokens have
        theirs last, so that each layer before the convolution would read and write across the rows. Named `options`, a
        `mode` or another `backend` are taken as they are; with `torch.compile(model)` say the same by
        `options={"layout_optimization": False}`.
        """
        if not args and not {"backend", "mode", "options"} & kwargs.keys():
            kwargs["options"] = {"layout_optimization": False}
        super().compile(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward: less memory for about a third more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: vectors, embeddings, and what the mixers name."""
        return no_weight_decay(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise learning rates."""
        last = (r"^norm", (99999,))
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), last]
        return {
            "stem": r"^(?:stem|position|class_token)",
            "blocks": [(r"^stages\.(\d+)", None), last] if coarse else fine,
        }

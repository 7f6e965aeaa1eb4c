"""The isotropic vision backbone: patches, then N equal blocks on one grid.

Axis letters: B batch, T frames, H height, W width, N tokens, C channels, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional

from ...errors import OptionError
from ...mixers import Grid, Mixer
from ...schema import Between, Count, Depth, Fraction, Probability, Side, Size, defaults_of, split_spec
from ..parts.blocks import InitStd, LayerScale, drop_path_rates, outer_mixers
from ..parts.depth_averaging import DepthAverage, layers_of
from ..parts.heads import HEADS
from ..parts.stems import STEMS
from .fit import check_drops, check_fit
from .layers import Place, build_block, stage_specs
from .pyramid import Stage
from .registry import BACKBONES
from .vision import Carried, VisionBackbone, check_image_size


@dataclass(kw_only=True)
class IsotropicConfig:
    """Configuration of an `Isotropic` model.

    A part is a name or a mapping with `name` and options.

    Attributes:
        dim: channels C.
        depth: number of blocks.
        mixer: token mixer, or a list that is repeated to the depth.
        channel_mixer: channel mixer; None for blocks without one.
        block: the block around the mixers, or a list with one for each layer.
        norm: norm of the blocks.
        layer_scale, res_scale: initial scales of branches and identity paths; None for no scale.
        patch_size: side of the patches.
        stem: what makes the grid from the image; None for a linear patch embedding.
        position: "learned" adds a position table, resized bicubically to other grids; "none" does not.
        class_token: prepend a class token. The mixers then see a sequence `(B, 1 + N, C)`, not a grid; those with an
            option `class_token` that is on are built for the grid without it. "middle" puts it between the two halves
            of the patches, the first being the shorter one: Vision Mamba (2024), arXiv:2401.09417.
        average_layers: the input of every layer is a learned weighted sum of the outputs of all earlier ones, a layer
            being half of a block; see `depth_averaging.DepthAverage`.
        head: classification head.
        image_size: one number or [H, W]; fixes the grid of mixers that need it.
        frames: T, for clips: the blocks see the grid (T, H, W) of all frames' patches. None for images.
        in_chans: channels of the image.
        num_classes: classes K; 0 for no classifier.
        drop_path: stochastic depth of the last block; earlier blocks have proportionally less.
        init_std: deviation of the initial weights outside of the mixers; None for `fan_in ** -0.5`, for narrow models.
    """

    dim: Size
    depth: Depth
    mixer: Any
    channel_mixer: Any = field(default_factory=lambda: {"name": "mlp"})
    block: Any = "metaformer"
    norm: Any = "layer_norm"
    layer_scale: LayerScale | None = None
    res_scale: Fraction | None = None
    patch_size: Side = 16
    stem: Any = None
    position: Literal["none", "learned"] = "none"
    class_token: bool | Literal["middle"] = False
    average_layers: bool = False
    head: Any = field(default_factory=lambda: {"name": "linear", "norm_first": True})
    image_size: Size | list[Size] = 224
    frames: Annotated[int, Between(1, 2**16)] | None = None
    in_chans: Size = 3
    num_classes: Count = 1000
    drop_path: Probability = 0.0
    init_std: InitStd | None = 0.02


def resampled(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """A table of positions `(1, H W, C)` for the plane `old`, interpolated bicubically to `new`, as timm does it."""
    plane = table.float().unflatten(1, old).movedim(-1, 1)
    plane = functional.interpolate(plane, size=new, mode="bicubic", antialias=True)
    return plane.movedim(1, -1).flatten(1, 2).to(table.dtype)


@BACKBONES.register("isotropic")
class Isotropic(VisionBackbone):
    """Equal MetaFormer blocks on one grid of patches, as in ViT (arXiv:2010.11929) and MLP-Mixer (arXiv:2105.01601).

    Built from an `IsotropicConfig`; see `VisionBackbone` for what can be called.

    Raises:
        ConfigError: any part that does not fit, with the path of its key.
    """

    config_class = IsotropicConfig

    def __init__(self, config: IsotropicConfig) -> None:
        super().__init__(config)
        dim, depth = config.dim, config.depth
        size = check_image_size(config.image_size, key="image_size")
        patch = {"name": "conv", "kernel_size": config.patch_size, "stride": config.patch_size, "padding": 0}
        check_fit(STEMS, config.stem, key="stem", rank=2, what="images")
        self.stem = STEMS.build(config.stem or patch, config.in_chans, dim, key="stem")
        if config.frames is not None and config.class_token:
            raise OptionError("frames", "clips are grids of tokens; they need class_token=false.")
        self.grid: Grid = self.grid_of(size, key="image_size")
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        drop_paths = drop_path_rates(config.drop_path, depth)
        tokens = math.prod(self.grid) + int(bool(config.class_token))
        self.position = nn.Parameter(torch.zeros(1, tokens, dim)) if config.position == "learned" else None

        names = ("mixer", "channel_mixer", "block", "norm", "layer_scale", "res_scale")
        mixer_grid = (tokens,) if config.class_token else self.grid
        what = "sequences; set class_token=false for mixers of images" if config.class_token else "a grid of patches"
        blocks = []
        for i, spec in enumerate(stage_specs(config, depth, names, repeated=("mixer",))):
            _, options = split_spec(spec.mixer, key=spec.paths["mixer"], kind="mixer")
            knows_token = config.class_token and options.get("class_token", False)
            if knows_token and config.class_token == "middle":
                where = f"{spec.paths['mixer']}.class_token"
                raise OptionError(where, "the mixer expects it first; use class_token=true.")
            place = Place(self.grid if knows_token else mixer_grid, len(mixer_grid), what, i, depth)
            block = build_block(spec, dim, place, drop_path=drop_paths[i], defaults=defaults_of(IsotropicConfig))
            if any(getattr(earlier, "prunes", False) for earlier in blocks):
                check_drops(block, key=spec.paths["block"])
            blocks.append(block)
        drops = any(getattr(block, "prunes", False) for block in blocks)
        if drops and config.average_layers:
            raise OptionError("average_layers", "blocks that drop tokens leave no average of layers; use false.")
        # timm takes features after any block of such a model, so each block counts as a stage
        self.stages = nn.ModuleList()
        outputs = 1
        for block in blocks:
            average = None
            if config.average_layers:
                average = DepthAverage(len(layers_of([block])), before=outputs)
                outputs += len(average.weights)
            self.stages.append(Stage(None, [block], average=average))
        self.feature_info = [
            {"num_chs": dim, "reduction": self.stem.stride, "module": f"stages.{i}"} for i in range(depth)
        ]
        self.num_features = self.head_hidden_size = dim
        head = config.head
        check_fit(HEADS, head, key="head", rank=len(mixer_grid), what=what)
        if config.class_token:  # the class token carries the class, unless the config says otherwise
            pool = "middle_token" if config.class_token == "middle" else "token"
            head = {"pool": pool, **({"name": head} if isinstance(head, str) else head)}
        filled_in: Any = {"dims": [dim], "stride": self.stem.stride, "frames": config.frames}
        self.head = HEADS.build(head, dim, config.num_classes, key="head", **filled_in)
        if self.head.pool.endswith("token") and not config.class_token:
            raise OptionError("head.pool", f'"{self.head.pool}" needs a class token; set class_token=true.')
        if drops and self.head.pool not in ("token", "middle_token"):
            raise OptionError("head.pool", f'"{self.head.pool}" reads tokens that blocks drop; use "token".')
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=1e-6)

    def grid_of(self, size: tuple[int, int], *, key: str = "image_size") -> Grid:
        """The grid of tokens for images of a size."""
        plane = self.stem.out_size(size, key=key)
        return plane if self.config.frames is None else (self.config.frames, *plane)

    def resized_position(self, grid: Grid) -> Tensor | None:
        """The position table `(1, N, C)` for a grid, interpolated where that is not the model's; frames stay apart."""
        # torch.fx knows no sizes: what it traces is for the grid of the model
        if self.position is None or isinstance(grid[0], Proxy) or tuple(grid) == tuple(self.grid):
            return self.position
        if len(grid) == 2:
            prefix = int(self.class_token is not None)
            table = resampled(self.position[:, prefix:], self.grid, grid)
            return torch.cat([self.position[:, :prefix], table], 1)
        frames = self.position.unflatten(1, (grid[0], -1)).transpose(1, 2).flatten(2)  # (1, H W, T C)
        frames = resampled(frames, self.grid[1:], grid[1:])
        return frames.unflatten(2, (grid[0], -1)).transpose(1, 2).flatten(1, 2)

    def embed(self, x: Tensor) -> Tensor:
        if self.config.frames is not None:
            x = x.transpose(1, 2)
            x = self.stem(x.flatten(0, 1).permute(0, 2, 3, 1)).unflatten(0, x.shape[:2])
            position = self.resized_position(tuple(x.shape[1:-1]))
            return x if position is None else x + position.view(1, *x.shape[1:])
        x = self.stem(x.permute(0, 2, 3, 1))
        batch, height, width, dim = x.shape
        position = self.resized_position((height, width))
        if self.class_token is None:
            return x if position is None else x + position.view(1, height, width, dim)
        token, x = self.class_token, x.reshape(batch, height * width, dim)
        if position is not None:  # the first entry is that of the class token, wherever this stands
            token, x = token + position[:, :1], x + position[:, 1:]
        at = self.token_index(x.shape[1])
        return torch.cat([x[:, :at], token.expand(batch, -1, -1), x[:, at:]], dim=1)

    def token_index(self, patches: int) -> int:
        """Where the class token stands in a sequence of so many patches."""
        return patches // 2 if self.config.class_token == "middle" else 0

    def stage_forward(self, index: int, x: Tensor, carried: Carried) -> Tensor:
        return self.run_blocks(self.stages[index], x, carried)

    def map_of(self, x: Tensor) -> Tensor:
        return x if self.class_token is not None else super().map_of(x)

    def unmap(self, x: Tensor) -> Tensor:
        return x if self.class_token is not None else super().unmap(x)

    def map_without_token(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        if self.class_token is None:
            return self.map_of(x)
        height, width = self.stem.out_size(image_size)
        at = self.token_index(height * width)
        patches = torch.cat([x[:, :at], x[:, at + 1 :]], dim=1) if at else x[:, 1:]
        return patches.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)

    def mixers_with_grids(self, image_size: int | tuple[int, int]) -> list[tuple[Mixer, Grid]]:
        grid = self.grid_of(check_image_size(image_size, key="image_size"))
        whole = (math.prod(grid) + 1,) if self.class_token is not None else grid
        mixers = outer_mixers(self.stages)
        return [(m, grid if m.class_token else whole) for m in mixers]

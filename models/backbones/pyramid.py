"""The vision pyramid: stages of equal blocks with downsampling between them.

Axis letters: B batch, T frames, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor, nn

from ...errors import OptionError
from ...mixers import Grid, Mixer
from ...schema import Between, Count, Fraction, Probability, Size, defaults_of
from ..parts.blocks import InitStd, LayerScale, drop_path_rates, outer_mixers
from ..parts.depth_averaging import DepthAverage, layers_of
from ..parts.heads import HEADS
from ..parts.mobile_parts import FUSIONS
from ..parts.stem_variants import SHORTCUTS
from ..parts.stems import STEMS
from .fit import check_fit
from .layers import Place, build_block, per_stage, stage_specs
from .registry import BACKBONES
from .vision import Carried, VisionBackbone, check_image_size


@dataclass(kw_only=True)
class PyramidConfig:
    """Configuration of a `Pyramid`.

    A part is a name or a mapping with `name` and options. Where "per stage" is said, one value stands for all stages.

    Attributes:
        dims: channels of each stage.
        depths: blocks of each stage.
        mixer: token mixer, per stage.
        channel_mixer: channel mixer, per stage; None for blocks without one.
        block: the block around the mixers, per stage.
        norm: norm, per stage.
        layer_scale: initial scale of the branches, per stage; None for no scale.
        res_scale: initial scale of the identity paths, per stage; None for no scale.
        stem: what makes the first grid from the image.
        downsample: what stands before stages 2, 3, ...: one for all or a list; None keeps grid and width.
        output_stride: pixels of the image per token of the last stage, at most: later downsampling keeps the grid, with
            the same parameters. None for as many as the downsampling makes.
        shortcut: paths that lead the inputs of stages past them; None for none.
        fusion: what joins the result of a stage's blocks with what entered them, per stage; None for nothing.
        average_layers: the input of every layer is a learned weighted sum of the outputs of all earlier ones of its
            stage, a layer being half of a block; see `depth_averaging.DepthAverage`.
        head: classification head.
        image_size: one number or [H, W]; fixes the grids of mixers that need them.
        frames: T, for clips; every frame is encoded for itself, and the head joins them. None for images.
        in_chans: channels of the image.
        num_classes: classes K; 0 for no classifier.
        drop_path: stochastic depth of the last block; earlier blocks have proportionally less.
        init_std: deviation of the initial weights outside of the mixers; None for `fan_in ** -0.5`, for narrow models.
    """

    dims: list[Size]
    depths: list[Annotated[int, Between(0, 10_000)]]
    mixer: Any
    channel_mixer: Any = field(default_factory=lambda: {"name": "mlp"})
    block: Any = "metaformer"
    norm: Any = "layer_norm"
    layer_scale: LayerScale | list[LayerScale | None] | None = None
    res_scale: Fraction | list[Fraction | None] | None = None
    stem: Any = "conv"
    downsample: Any = None
    output_stride: Size | None = None
    shortcut: Any = None
    fusion: Any = None
    average_layers: bool = False
    head: Any = "linear"
    image_size: Size | list[Size] = 224
    frames: Annotated[int, Between(1, 2**16)] | None = None
    in_chans: Size = 3
    num_classes: Count = 1000
    drop_path: Probability = 0.0
    init_std: InitStd | None = 0.02


class Stage(nn.Module):
    """Downsampling, equal blocks, and a fusion with what entered these; `(B, H, W, C)` to `(B, H', W', C')`.

    `average` is what averages the outputs of earlier layers, None for nothing.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: list[nn.Module],
        fusion: nn.Module | None = None,
        average: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.fusion = fusion
        self.average = average


def _keep_grid(downsample: Any) -> None:
    if not hasattr(downsample, "without_stride"):
        raise OptionError("output_stride", f"the downsampling {type(downsample).__name__} cannot keep the grid.")
    downsample.without_stride(key="output_stride")


@BACKBONES.register("pyramid")
class Pyramid(VisionBackbone):
    """MetaFormer with a hierarchy of stages. Yu et al. (2021), arXiv:2111.11418; (2022), arXiv:2210.13452.

    Built from a `PyramidConfig`; see `VisionBackbone` for what can be called. `forward` maps images
    `(B, C_in, H, W)` to logits `(B, K)`.

    Raises:
        ConfigError: any part that does not fit, with the path of its key.
    """

    config_class = PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        stages = len(config.depths)
        if len(config.dims) != stages or stages == 0:
            raise OptionError("dims", f"{len(config.dims)} widths for {stages} stages (depths={config.depths}).")
        names = ("mixer", "channel_mixer", "block", "norm", "layer_scale", "res_scale", "fusion")
        layers = sum(config.depths)
        specs = stage_specs(config, stages, names)
        downsamples = [None, *per_stage(config.downsample, stages - 1, key="downsample")]
        rates = iter(drop_path_rates(config.drop_path, layers))
        size = check_image_size(config.image_size, key="image_size")

        check_fit(STEMS, config.stem, key="stem", rank=2, what="images")
        self.stem = STEMS.build(config.stem, config.in_chans, config.dims[0], key="stem")
        grid: Grid = self.stem.out_size(size, key="image_size")
        self.stages = nn.ModuleList()
        width, layer = config.dims[0], 0
        reduction = self.stem.stride
        for i, (spec, dim, depth) in enumerate(zip(specs, config.dims, config.depths, strict=True)):
            downsample = None
            if downsamples[i] is not None:
                check_fit(STEMS, downsamples[i], key="downsample", rank=2, what="images")
                downsample = STEMS.build(downsamples[i], width, dim, key="downsample")
                if config.output_stride is not None and reduction * downsample.stride > config.output_stride:
                    _keep_grid(downsample)
                grid = downsample.out_size((grid[0], grid[1]), key="image_size")
                reduction *= downsample.stride
            elif dim != width:
                raise OptionError("downsample", f"needed, since stage {i} changes the width from {width} to {dim}.")
            blocks = []
            for drop_path in itertools.islice(rates, depth):
                place = Place(grid, 2, "an image", layer, layers)
                blocks.append(build_block(spec, dim, place, drop_path=drop_path, defaults=defaults_of(PyramidConfig)))
                layer += 1
                if getattr(blocks[-1], "prunes", False):
                    raise OptionError(spec.paths["block"], "it drops tokens, and a stage needs whole grids.")
            fusion = None
            if spec.fusion is not None:
                check_fit(FUSIONS, spec.fusion, key=spec.paths["fusion"], rank=2, what="images")
                fusion = FUSIONS.build(spec.fusion, dim, key=spec.paths["fusion"])
            average = DepthAverage(len(layers_of(blocks))) if config.average_layers else None
            self.stages.append(Stage(downsample, blocks, fusion, average))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
            width = dim
        if config.output_stride not in (None, reduction):
            raise OptionError(
                "output_stride", f"{config.output_stride} is not reached; this model can have {self._strides()}."
            )
        self.shortcut = None
        if config.shortcut is not None:
            check_fit(SHORTCUTS, config.shortcut, key="shortcut", rank=2, what="images")
            self.shortcut = SHORTCUTS.build(config.shortcut, list(config.dims), key="shortcut")
        rank, what = (2, "images") if config.frames is None else (3, "clips")
        check_fit(HEADS, config.head, key="head", rank=rank, what=what)
        filled_in: Any = {"dims": list(config.dims), "stride": self.stem.stride, "frames": config.frames}
        self.head = HEADS.build(config.head, width, config.num_classes, key="head", **filled_in)
        if self.head.pool.endswith("token"):
            raise OptionError("head.pool", f'"{self.head.pool}" needs a class token, which a pyramid has not.')
        self.num_features, self.head_hidden_size = width, self.head.dim
        self.init_weights()

    def _strides(self) -> str:
        """The strides that stages have, for messages."""
        return ", ".join(sorted({str(info["reduction"]) for info in self.feature_info}, key=int))

    def embed(self, x: Tensor) -> Tensor:
        if self.config.frames is not None:
            x = x.transpose(1, 2).flatten(0, 1)  # frames are images of their own
        return self.stem(x.permute(0, 2, 3, 1))

    def map_of(self, x: Tensor) -> Tensor:
        return super().map_of(x if self.config.frames is None else x.unflatten(0, (-1, self.config.frames)))

    def stage_forward(self, index: int, x: Tensor, carried: Carried) -> Tensor:
        stage = self.stages[index]
        if stage.downsample is not None:
            x = stage.downsample(x)
        if self.shortcut is not None:
            x = self.shortcut(index, x, carried.paths)
        y = self.run_blocks(stage, x, Carried())
        return y if stage.fusion is None else stage.fusion(x, y)

    def mixers_with_grids(self, image_size: int | tuple[int, int]) -> list[tuple[Mixer, Grid]]:
        size = check_image_size(image_size, key="image_size")
        grid: Grid = self.stem.out_size(size)
        found: list[tuple[Mixer, Grid]] = []
        for stage in self.stages:
            if stage.downsample is not None:
                grid = stage.downsample.out_size((grid[0], grid[1]))
            found += [(m, grid) for m in outer_mixers(stage.blocks)]
        return found

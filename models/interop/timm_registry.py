"""Our vision models in timm's registry, as `timm.create_model("mixerzoo_<name>")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from ...errors import ConfigError
from ..backbones.vision import VisionBackbone, check_image_size
from ..create import create_model
from ..registry import BACKBONES, CONFIGS

PREFIX = "mixerzoo_"


def _vision_models() -> list[str]:
    """Names of the vision models; reads the line `backbone:` alone, since parsing all files would slow the import."""
    kinds = {f"backbone: {kind}" for kind, cls in BACKBONES.items() if issubclass(cls, VisionBackbone)}
    return sorted(
        path.stem
        for path in CONFIGS.glob("*.yaml")
        if kinds
        & {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("backbone:")}
    )


def timm_model(
    name: str,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    out_indices: Any = None,
    img_size: Any = None,
    global_pool: str | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model under timm's names for options.

    Args:
        name: of our model.
        pretrained: must be False: we release no weights; `create_model(name, checkpoint=FILE)` converts timm's.
        features_only: wrap as a feature extractor that returns a list of maps `(B, C, H, W)`.
        out_indices: which stages, with `features_only`.
        img_size, global_pool, drop_rate, drop_path_rate: `image_size`, `head.pool`, `head.dropout`, `drop_path` here.
        options: of `create_model`.

    Raises:
        ConfigError: `pretrained`, or an option that our models do not have.
    """
    for internal in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(internal, None)
    if pretrained:
        raise ConfigError(
            f'{PREFIX}{name}: no weights are released; use mixerzoo.create_model("{name}", checkpoint=FILE).'
        )
    renamed = {"image_size": img_size, "head.pool": global_pool, "head.dropout": drop_rate, "drop_path": drop_path_rate}
    if isinstance(img_size, tuple):
        renamed["image_size"] = list(img_size)
    model = create_model(name, **options, **{k: v for k, v in renamed.items() if v is not None})
    if not isinstance(model, VisionBackbone):
        raise ConfigError(f"{PREFIX}{name}: not a vision model.")
    size = check_image_size(model.config.image_size, key="image_size")
    model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
        "architecture": PREFIX + name,
        "input_size": (model.in_chans, *size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "num_classes": model.num_classes,
        "classifier": "head.fc",
        "first_conv": "stem.conv",
    }
    if features_only:
        count = min(4, len(model.stages))
        return FeatureGetterNet(model, out_indices=count if out_indices is None else out_indices)
    return model


def _entry(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return timm_model(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = PREFIX + name
    entry.__doc__ = f"mixerzoo's `{name}`; see `timm_model`."
    return entry


def register_all() -> None:
    """Enter all vision models into timm's registry."""
    for name in _vision_models():
        register_model(_entry(name))

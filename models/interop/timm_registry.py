"""Our vision models in timm's registry, as `timm.create_model("mixerzoo_<name>")`, built by timm's own builder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import (
    FeatureGraphNet,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    register_model,
)
from torch import nn

from ...errors import ConfigError
from ...mixers import mixer_class
from ...schema import defaults_of, keyword_options, split_spec
from ..backbones.isotropic import Isotropic
from ..backbones.vision import VisionBackbone, check_image_size
from ..create import create_model, on_meta
from ..registry import backbone_class, list_models, model_config

PREFIX = "mixerzoo_"
# timm's names for options, and ours
_RENAMED = {
    "img_size": "image_size", "global_pool": "head.pool", "drop_rate": "head.dropout", "drop_path_rate": "drop_path"
}  # fmt: skip
# How the images of a family without a counterpart in timm are prepared, by the start of its names: what the published
# code does at evaluation. All others: ImageNet's mean and deviation, bicubic, 224 of 256 pixels, as in DeiT's code.
_DATA: dict[str, dict[str, Any]] = {
    "affnet": {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "crop_pct": 256 / 288},
    "identityformer": {"crop_pct": 1.0},
    "randformer": {"crop_pct": 1.0},
    "ninformer_cifar": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "crop_pct": 1.0},
    "metaformer_digits": {"mean": (0.3054,), "std": (0.3759,), "crop_pct": 1.0},
    "metaformer_fashion": {"mean": (0.2860,), "std": (0.3530,), "crop_pct": 1.0},
}
_USUAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.875}

default_cfgs: dict[str, Any] = {}  # timm looks for this name beside the entry points


def _vision_models() -> list[str]:
    return [n for n in list_models() if issubclass(backbone_class(model_config(n)), VisionBackbone)]


def _data(name: str) -> dict[str, Any]:
    """Mean, deviation, interpolation and crop: those of timm's model of the same architecture, where there is one."""
    for theirs in (name, f"{name}_224"):
        if is_model(theirs):
            found = get_pretrained_cfg(theirs)
            if found is not None:
                return {key: getattr(found, key) for key in (*_USUAL, "crop_mode")}
    own = next((data for start, data in _DATA.items() if name.startswith(start)), {})
    return {**_USUAL, **own}


def _channels(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """One number for each channel: the same ones, or their mean for another number of channels."""
    return tuple(values) if len(values) == count else (sum(values) / len(values),) * count


def _needs_grid(config: Mapping[str, Any]) -> bool:
    """Whether a model is built for one size of images."""
    specs = config["mixer"] if isinstance(config["mixer"], (list, tuple)) else [config["mixer"]]
    return any(mixer_class(split_spec(s, key="mixer", kind="mixer")[0]).needs_grid for s in specs)


def pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm keeps about a model, from its configuration alone, without building it."""
    config = model_config(name)
    cls: Any = backbone_class(config)
    config = {**defaults_of(cls.config_class), **config}
    size = check_image_size(config["image_size"], key="image_size")
    data = _data(name)
    for key in ("mean", "std"):
        data[key] = _channels(data[key], config["in_chans"])
    return {
        **data,
        "architecture": PREFIX + name,
        "input_size": (config["in_chans"], *size),
        "fixed_input_size": _needs_grid(config),
        "num_classes": config["num_classes"],
        "classifier": "head.fc",
    }


@functools.cache
def _measured(name: str) -> dict[str, Any]:
    """What only a built model tells: the size of its last map, and the layer that reads the images."""
    model = on_meta(name)
    assert isinstance(model, VisionBackbone)
    size = check_image_size(model.config.image_size, key="image_size")
    grid = model.grid if isinstance(model, Isotropic) else model.mixers_with_grids(size)[-1][1]
    layers = first_layers(model)
    return {"pool_size": tuple(grid[-2:]), "first_conv": layers[0] if len(layers) == 1 else layers}


def first_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers of the stem that read the images: the first one with a matrix, and its neighbours in a list."""
    for name, module in model.stem.named_modules(prefix="stem"):  # type: ignore[union-attr]
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim > 1:
            parent = name.rpartition(".")[0]
            beside = model.get_submodule(parent)
            several = isinstance(beside, nn.ModuleList)  # of patches of several sizes
            return tuple(f"{parent}.{key}" for key, _ in beside.named_children()) if several else (name,)
    return ()


class GraphFeatures(FeatureGraphNet):
    """timm's features by `torch.fx`, whose maps have their channels last, as maps `(B, C, H, W)`.

    Raises:
        ConfigError: a model with a class token, whose stages give sequences.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        if getattr(model, "class_token", None) is not None:
            raise ConfigError('feature_cls: "fx" does not fit models with a class token. Allowed: getter.')
        super().__init__(model, *args, **options)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [y.movedim(-1, 1) for y in self.graph_module(x).values()]


def _build(name: str, **options: Any) -> nn.Module:
    """A model under timm's names for options, which timm's builder hands over.

    Raises:
        TypeError: an option that there is not, as timm's models raise.
        ConfigError: an option whose value does not fit.
    """
    device, dtype = options.pop("device", None), options.pop("dtype", None)
    checkpoint = options.pop("checkpoint", None)
    known = {*keyword_options(backbone_class(model_config(name)).config_class), *_RENAMED, "mixer"}
    for option in options:
        if option.split(".")[0] not in known:
            raise TypeError(f"{PREFIX}{name} got an unexpected keyword argument '{option}'")
    if isinstance(options.get("img_size"), tuple):
        options["img_size"] = list(options["img_size"])
    renamed = {_RENAMED.get(k, k): v for k, v in options.items() if v is not None}
    with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
        model = create_model(name, checkpoint=checkpoint, **renamed)
    return model if dtype is None else model.to(dtype)


def timm_model(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model as timm does.

    Args:
        name: of our model.
        pretrained: we release no weights; with `pretrained_cfg_overlay={"file": FILE}` a file is read as
            `create_model(name, checkpoint=FILE)` reads it, and timm's own sources (`hf-hub:`, `local-dir:`) work.
        pretrained_cfg, pretrained_cfg_overlay: timm's settings of weights and data, whole or in part.
        options: timm's (`num_classes`, `in_chans`, `img_size`, `global_pool`, `drop_rate`, `drop_path_rate`,
            `features_only` with `out_indices` and `feature_cls`, `device`, `dtype`), and those of `create_model`.

    Raises:
        ConfigError: `pretrained` without weights, an option that does not fit, or a way of taking features that there
            is not.
        TypeError: an option that there is not.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    measured = _measured(name)
    given = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else getattr(pretrained_cfg, "__dict__", {})
    overlay = {**{k: v for k, v in measured.items() if not given.get(k)}, **overlay}
    sources = {**dict(given), **overlay}
    if pretrained and not any(sources.get(k) for k in ("file", "url", "hf_hub_id", "state_dict")):
        raise ConfigError(
            f'{PREFIX}{name}: no weights are released; use mixerzoo.create_model("{name}", checkpoint=FILE).'
        )
    checkpoint = sources.get("file") if pretrained and sources.get("source") != "local-dir" else None
    kind = options.get("feature_cls", "getter")
    if options.get("features_only") and isinstance(kind, str) and kind.lower() not in ("getter", "fx"):
        raise ConfigError(f'feature_cls: "{kind}" does not fit models with the channels last. Allowed: fx, getter.')
    if isinstance(kind, str) and kind.lower() == "fx":
        options["feature_cls"] = GraphFeatures
    stages = len(on_meta(name).stages) if options.get("features_only") and "out_indices" not in options else 4  # type: ignore[arg-type]
    features = {"feature_cls": "getter", "out_indices": tuple(range(-min(4, stages), 0))}
    model = build_model_with_cfg(
        functools.partial(_build, name, checkpoint=checkpoint),
        PREFIX + name,
        pretrained and checkpoint is None,
        pretrained_cfg=dict(pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        feature_cfg=features,
        **options,
    )
    _describe(model, name, options, overlay)
    return model


def _describe(model: nn.Module, name: str, options: Mapping[str, Any], overlay: Mapping[str, Any]) -> None:
    """What depends on how the model was built: its channels and size, and the frames of clips."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels = options.get("in_chans", cfg["input_size"][0])
    size = tuple(cfg["input_size"][-2:])
    if options.get("img_size") is not None:
        size = check_image_size(options["img_size"], key="img_size")
    if "input_size" not in overlay:
        frames = model_config(name).get("frames")
        frames = () if frames is None else (frames,)
        cfg["input_size"] = (channels, *frames, *size)
    for key in ("mean", "std"):
        if key not in overlay:
            cfg[key] = _channels(cfg[key], channels)


def _entry(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return timm_model(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = PREFIX + name
    entry.__doc__ = f"mixerzoo's `{name}`; see `timm_model`."
    return entry


def register_all() -> None:
    """Enter all vision models into timm's registry."""
    names = _vision_models()
    default_cfgs.update(generate_default_cfgs({PREFIX + name: pretrained_cfg(name) for name in names}))
    for name in names:
        register_model(_entry(name))

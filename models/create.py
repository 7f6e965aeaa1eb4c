"""`create_model`: a model by name, with overrides and weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, unknown
from ..plugins import load_kept
from ..schema import defaults_of, keyword_options
from .conversion.checkpoint import load_into, saved_config
from .registry import apply_overrides, backbone_class, build_model, list_models, model_config


def create_model(
    name_or_config: str | Path | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    mixer: Any = None,
    checkpoint: str | Path | None = None,
    memory_check: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Build a model.

    Args:
        name_or_config: a name from `list_models()`, the path of a YAML file, or a mapping; or what was trained, to go
            on with it: a run's folder or a `.safetensors` file, whose weights are taken, too.
        num_classes: classes; by default the config's, 1000. 0 for features.
        in_chans: channels of the images; by default the config's, 3.
        mixer: another token mixer for all stages or layers (name or mapping), or a list with one for each.
        checkpoint: file with weights: ours, timm's, the official ones or Hugging Face's (`.safetensors`, `.pth`, `.pt`,
            `.bin`), the index of a sharded one, or a folder with one of these; `~` is the home folder. The layout is
            told from the keys; a prefix that all keys share (`module.`, `_orig_mod.`) is left out. Where two sources
            differ in a detail that the weights alone do not show, the model is built as the source of the file
            computes, and a `config.json` beside the file must agree with the model. Another number of classes gets a
            fresh classifier and another number of channels an adapted stem, with a warning.
        memory_check: refuse a model whose parameters alone exceed the machine's memory.
        overrides: other entries of the config; `create_model(name, **{"head.dropout": 0.1})` reaches inside.

    Returns:
        A module in training mode on the CPU (or the current default device).

    Raises:
        ConfigError: unknown name, key or part, a wrong type, an impossible combination, or a file that does not fit.
    """
    if is_trained(name_or_config):
        path = Path(name_or_config).expanduser()  # type: ignore[arg-type]
        if checkpoint is not None:
            raise ConfigError(f"checkpoint: {checkpoint} beside {path}, which has weights of its own.")
        load_kept(path if path.is_dir() else path.resolve().parents[2])
        config, checkpoint = saved_config(path), path
    else:
        config = model_config(name_or_config)
    changes = dict(overrides)
    for name, value in (("num_classes", num_classes), ("in_chans", in_chans), ("mixer", mixer)):
        if value is not None:
            changes[name] = value
    cls = backbone_class(config)
    known = keyword_options(cls.config_class)
    for path in changes:
        if path.split(".")[0] not in known:
            raise unknown("model", path, known)
    config = {**defaults_of(cls.config_class), **config}
    native_size = config.get("image_size")
    config = apply_overrides(config, changes)
    if checkpoint is None:
        return build_model(config, memory_check=memory_check)
    return load_into(config, checkpoint, native_size=native_size, asked=changes)


def is_trained(name_or_config: object) -> bool:
    """Whether something is the path of a run's folder or of weights, and not a model's name or configuration."""
    if not isinstance(name_or_config, (str, Path)):
        return False
    path = Path(name_or_config).expanduser()
    return path.suffix == ".safetensors" or (path.is_dir() and str(name_or_config) not in list_models())


def on_meta(name_or_config: str | Path | Mapping[str, Any], **options: Any) -> nn.Module:
    """The model without memory for its weights, for counting."""
    with torch.device("meta"):
        return create_model(name_or_config, **options)

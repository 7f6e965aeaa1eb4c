"""Configurations of models by name, by file or by mapping, and models built from them with fresh weights."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from ..errors import ConfigError, under, unknown
from ..mixers.memory import fits_memory
from ..plugins import config_files, discover
from ..schema import build_dataclass
from .backbones.registry import BACKBONES

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models, those of plugins too, that match a shell pattern, e.g. `list_models("caformer_*")`."""
    return sorted(name for name in _files() if fnmatch.fnmatch(name, pattern))


def _files() -> dict[str, Path]:
    """Configurations by name: ours, and those that plugins bring."""
    discover(f"{__name__.rpartition('.')[0]}.parts")
    return {path.stem: path for path in CONFIGS.glob("*.yaml")} | config_files("model")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model: the file {path} cannot be read: {error}.") from error
    except Exception as error:  # YAML's own errors have no common base with OmegaConf's
        raise ConfigError(f"model: {path} is not a model config: {error}") from error
    if not isinstance(config, dict) or not {"backbone", "base"} & config.keys():
        raise ConfigError(f"model: {path} is not a model config: it needs the key `backbone` (or `base`).")
    return {str(k): v for k, v in config.items()}


_read_own = functools.cache(_read_yaml)  # a user's file may change while a notebook runs; ours do not


def model_config(name_or_config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model as a new mapping, from its name, a YAML file or a mapping.

    A mapping may hold `base: NAME`, a model whose configuration it changes.

    Raises:
        ConfigError: unknown name, unreadable file, or a mapping without `backbone`.
    """
    if isinstance(name_or_config, Mapping):
        plain: Any = (
            OmegaConf.to_container(name_or_config, resolve=True) if OmegaConf.is_config(name_or_config) else None
        )
        config: dict[str, Any] = dict(name_or_config if plain is None else plain)
        if "base" in config:
            base = model_config(config.pop("base"))
            config = {**base, **config}
        if "backbone" not in config:
            raise ConfigError(f"model.backbone: missing. Allowed: {', '.join(sorted(BACKBONES.entries))}.")
        return copy.deepcopy(config)
    text = str(name_or_config)
    if text.endswith((".yaml", ".yml")):
        return model_config(_read_yaml(Path(text)))
    path = CONFIGS / f"{text}.yaml"
    if "/" not in text and path.is_file():
        return copy.deepcopy(_read_own(path))
    files = _files()
    if text not in files:
        if "/" in text:
            raise ConfigError(f"model: there is no folder or file {text}, nor a model of this name.")
        raise unknown("model", text, files, limit=12)
    return model_config(_read_yaml(files[text]))


def apply_overrides(config: dict[str, Any], overrides: Mapping[str, Any], *, key: str = "model") -> dict[str, Any]:
    """A config with changed entries; `{"head.dropout": 0.1}` changes inside of a part.

    Raises:
        ConfigError: a path that leads into something that is not a mapping.
    """
    config = copy.deepcopy(config)
    for path, value in overrides.items():
        *parents, last = path.split(".")
        node: dict[str, Any] = config
        for i, parent in enumerate(parents):
            entry: Any = node.get(parent)
            if isinstance(entry, str):
                entry = {"name": entry}
            if not isinstance(entry, dict):
                where = ".".join([key, *parents[: i + 1]])
                raise ConfigError(f"{where}: {entry!r} has no entries, so {path} cannot be changed.")
            node[parent] = entry
            node = entry
        node[last] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return config


def backbone_class(config: Mapping[str, Any], *, key: str = "model") -> Any:
    """The class of a config's `backbone` entry."""
    kind = config.get("backbone")
    if not isinstance(kind, str) or kind not in BACKBONES.entries:
        raise unknown(f"{key}.backbone", kind, BACKBONES.entries)
    return BACKBONES.entries[kind]


def build_model(config: Mapping[str, Any], *, key: str = "model", memory_check: bool = True) -> nn.Module:
    """The model of a complete configuration, with fresh weights. It keeps the configuration as `model_config`.

    Args:
        config: with `backbone`.
        key: path of the configuration, for messages.
        memory_check: refuse parameters that the machine's memory cannot hold.

    Raises:
        ConfigError: any part that does not fit, with its path.
    """
    cls = backbone_class(config, key=key)
    fields = {k: v for k, v in config.items() if k != "backbone"}
    config_of_backbone = build_dataclass(cls.config_class, fields, key=key)
    with under(key), fits_memory(memory_check):
        model = cls(config_of_backbone)
    model.model_config = dict(copy.deepcopy(config))  # type: ignore[assignment]
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration that `create_model` rebuilds this model from.

    Raises:
        ConfigError: a model that was not built by `create_model`.
    """
    config = getattr(model, "model_config", None)
    if config is None:
        raise ConfigError(f"{type(model).__name__} was not built by create_model and has no configuration.")
    current = copy.deepcopy(config)
    for name in ("num_classes", "in_chans"):
        if name in {f.name for f in dataclasses.fields(type(model).config_class)}:  # type: ignore[attr-defined]
            current[name] = getattr(model, name, current.get(name))
    return current

"""Checkpoint files: our own, and those of other sources, told apart by their keys."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import ConfigError
from ..registry import apply_overrides, build_model, config_of
from ..resize import resize_grid
from .layouts import StateDict, layouts

_METADATA = "mixerzoo_model"
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")


def read_state_dict(path: Path) -> tuple[StateDict, dict[str, Any] | None]:
    """The tensors of a checkpoint file, and the configuration of the model where the file holds it.

    Nothing is unpickled but tensors and plain containers.

    Raises:
        ConfigError: no such file, a damaged one, or one without tensors.
    """
    if not path.is_file():
        raise ConfigError(f"checkpoint: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as f:
                metadata = f.metadata() or {}
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
            config = json.loads(metadata[_METADATA]) if _METADATA in metadata else None
            return tensors, config
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ConfigError(
            f"checkpoint: {path} cannot be read as tensors (damaged, or not a checkpoint): {reason}"
        ) from e
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ConfigError(f"checkpoint: {path} holds no tensors by name.")
    if all(k.startswith("module.") for k in tensors):  # saved from a data-parallel wrapper
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors, None


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as safetensors, with its configuration in the metadata."""
    tensors = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, str(path), metadata={_METADATA: json.dumps(config_of(model))})


def _adapt_sizes(state: StateDict, model: nn.Module, path: Path) -> StateDict:
    """Drop a classifier of another number of classes, with a warning; leave all else as it is."""
    own = model.state_dict()
    classifier = {k for k in own if k.startswith("head.fc.")}
    differing = {k for k in classifier & state.keys() if own[k].shape != state[k].shape}
    if differing:
        there, here = state[min(differing)].shape[0], own[min(differing)].shape[0]
        if there != here:
            warnings.warn(
                f"{path.name}: its classifier has {there} classes, the model {here}: a fresh one is used.", stacklevel=4
            )
            state = {k: v for k, v in state.items() if k not in classifier}
            state.update({k: own[k] for k in classifier})
    return state


def _complaint(path: Path, model: nn.Module, state: Mapping[str, Tensor], layout: str) -> ConfigError:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]

    def some(names: list[str]) -> str:
        return ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "") or "none"

    return ConfigError(
        f"checkpoint: {path} does not fit the model (read as: {layout}). Missing: {some(missing)}. "
        f"Unexpected: {some(unexpected)}. Of another shape: {some(shapes)}."
    )


def _fits(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(own[k].shape == state[k].shape for k in own)


def _adapt_grid(state: StateDict, model: nn.Module, config: dict[str, Any], sizes: list[Any]) -> StateDict:
    """Weights made for another image size, interpolated to the model's: by way of a twin of the other size."""
    if _fits(state, model):
        return state
    for size in sizes:
        twin = build_model({**config, "image_size": size})
        if _fits(state, twin):
            twin.load_state_dict(state)
            return resize_grid(twin, config.get("image_size", size)).state_dict()
    return state


def load_into(config: dict[str, Any], path: Path, *, native_size: Any = None) -> nn.Module:
    """Build the model of a configuration with the weights of a file, as `create_model(..., checkpoint=FILE)`.

    Args:
        config: of the model.
        path: of the file.
        native_size: image size that the file's weights may be made for, where it says nothing itself. Weights of
            another size than the configuration's are interpolated.

    Raises:
        ConfigError: an unreadable file, or one that fits in no known layout; the message says which keys are missing,
            which are unexpected, and which have another shape.
    """
    state, saved = read_state_dict(path)
    layout = next((known for known in layouts() if known.matches(set(state), config)), None)
    if saved is not None and saved.get("backbone") == config.get("backbone"):
        # a detail such as the head's order is part of what the weights mean
        layout = None
        if "head" in saved:
            config = apply_overrides(config, {"head": saved["head"]})
    elif layout is not None:
        state = layout.convert(state, config)
        config = apply_overrides(config, layout.changes(config))
    model = build_model(config)
    state = _adapt_sizes(state, model, path)
    sizes = [size for size in ((saved or {}).get("image_size"), native_size) if size is not None]
    if not hasattr(getattr(model, "config", None), "image_size"):
        sizes = []  # not a model of images
    state = _adapt_grid(state, model, config, sizes)
    if not _fits(state, model):
        raise _complaint(path, model, state, layout.name if layout else "mixerzoo")
    model.load_state_dict(state)
    return model

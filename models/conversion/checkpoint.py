"""Checkpoint files: our own, and those of other sources, told apart by their keys."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ... import plugins
from ...errors import ConfigError
from ...mixers.layers import rename_parameters
from ...schema import defaults_of
from ..registry import apply_overrides, build_model, config_of
from ..resize import resize_grid
from . import files
from .files import METADATA, PLUGINS, Checkpoint
from .layouts import Facts, Layout, StateDict, layouts

# entries of a configuration in which a model may differ from that of its weights: they change no number of a forward
# pass, or are adapted to
_FREE = (
    "num_classes", "in_chans", "image_size", "frames", "drop_path", "dropout", "init_std", "objective", "pool", "head",
    "base", "sequence_length",
)  # fmt: skip


def read_state_dict(path: str | Path) -> tuple[StateDict, dict[str, Any] | None]:
    """The tensors of a checkpoint, and the configuration of the model where the file holds it; see `files.read`."""
    found = files.read(path)
    return found.tensors, found.model


def saved_config(path: str | Path) -> dict[str, Any]:
    """The configuration of the model that a file or a run's folder holds; its parts from outside are there.

    Raises:
        ConfigError: nothing that can be read, a file that does not say its model, or a plugin that is not loaded.
    """
    found = files.read(path, only_what_is_said=True)
    if found.model is None:
        raise ConfigError(
            f"model: {found.file} does not say which model it holds; create_model(NAME, checkpoint=FILE) is told its "
            "name."
        )
    plugins.require(found.plugins, where=found.file)
    return found.model


def save_model(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a model's weights as safetensors; the metadata hold its configuration and name the plugins that it needs.

    Args:
        model: built by `build_model`.
        path: of the file.
        metadata: further entries.
    """
    tensors = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    config = config_of(model)
    own = {METADATA: json.dumps(config)}
    if outside := plugins.needed(plugins.words(config)):
        own[PLUGINS] = json.dumps(outside)
    save_file(tensors, str(path), metadata={**(metadata or {}), **own})


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


# -- another number of classes or channels


def _adapt_classes(state: StateDict, model: nn.Module, path: Path) -> StateDict:
    """A fresh classifier, with a warning, where the file's has another number of classes, or there is none."""
    own = model.state_dict()
    classifier = {k for k in own if k.startswith("head.fc.")}
    there = {k for k in state if k.startswith("head.fc.")}
    shapes = [k for k in classifier & there if own[k].shape != state[k].shape]
    if shapes and state[min(shapes)].shape[0] != own[min(shapes)].shape[0]:
        said = f"{state[min(shapes)].shape[0]} classes, the model {own[min(shapes)].shape[0]}: a fresh one is used"
    elif classifier and not there:
        said = f"no weights, the model {own[min(classifier)].shape[0]} classes: a fresh one is used"
    elif there and not classifier:
        said = f"{state[min(there)].shape[0]} classes, the model none: it is left out"
    else:
        return state
    _warn(f"{path.name}: its classifier has {said}.")
    return {**{k: v for k, v in state.items() if k not in there}, **{k: own[k] for k in classifier}}


def _meta(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the state of a model."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {k: v.shape for k, v in build_model(config).state_dict().items()}


def _adapt_channels(state: StateDict, model: nn.Module, config: Mapping[str, Any], path: Path) -> StateDict:
    """Weights for another number of input channels: summed for one, else repeated and scaled to the same total."""
    own = model.state_dict()
    wanted = getattr(model, "in_chans", None)
    stem = [k for k in own if k.startswith("stem.") and k in state and own[k].shape != state[k].shape]
    if wanted is None or not stem:
        return state
    for given in sorted({state[k].shape[1] for k in stem if state[k].ndim > 1}):
        twin = _meta({**config, "in_chans": given})
        if not all(state[k].shape == twin[k] for k in stem):
            continue
        adapted = dict(state)
        for k in stem:
            (axis,) = [i for i, (a, b) in enumerate(zip(own[k].shape, state[k].shape, strict=True)) if a != b]
            adapted[k] = _other_channels(state[k], axis, own[k].shape[axis])
        _warn(f"{path.name}: made for {given} channels, the model has {wanted}: the weights of its stem are adapted.")
        return adapted
    return state


def _other_channels(weight: Tensor, axis: int, wanted: int) -> Tensor:
    given = weight.shape[axis]
    if wanted == 1:
        return weight.sum(axis, keepdim=True)
    repeated = torch.cat([weight] * math.ceil(wanted / given), axis).narrow(axis, 0, wanted)
    return repeated * (given / wanted)


# -- another image size


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


# -- what the weights do not show


def _differences(facts: Facts) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
            return a == b or math.isclose(a, b, rel_tol=1e-6)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    known = {k: (a, b) for k, (a, b) in facts.items() if a is not None and b is not None}
    return [f"{k} is {a!r} there, {b!r} in the model" for k, (a, b) in known.items() if not same(a, b)]


def _check_source(found: Checkpoint, layout: Layout | None, model: nn.Module) -> None:
    if layout is None or found.source is None or not {"model_type", "architectures", "d_model"} & found.source.keys():
        return
    different = _differences(layout.facts(found.source, model))
    if different:
        raise ConfigError(
            f"checkpoint: {found.file.parent / 'config.json'}, beside the weights, does not agree with the model: "
            f"{'; '.join(different)}. Build the model with the values of its weights."
        )


def _flat(entry: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(entry, Mapping):
        for name, value in entry.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(entry, (list, tuple)) and any(isinstance(value, Mapping) for value in entry):
        for i, value in enumerate(entry):
            yield from _flat(value, f"{prefix}[{i}]")
    else:
        yield prefix, list(entry) if isinstance(entry, tuple) else entry


def _check_saved(saved: Mapping[str, Any], config: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Warn where a model that was saved by us was another one than that which gets its weights."""

    def entries(given: Mapping[str, Any]) -> dict[str, Any]:
        whole = {**defaults_of(type(model).config_class), **given}  # type: ignore[attr-defined]
        spelled = {k: {"name": v} if isinstance(v, str) else v for k, v in whole.items() if k not in _FREE}
        return dict(_flat(spelled))

    there, here = entries(saved), entries(config)
    facts = {k: (there.get(k, "the default"), here.get(k, "the default")) for k in there.keys() | here.keys()}
    different = _differences({k: facts[k] for k in sorted(facts) if there.get(k) != here.get(k)})
    if different:
        _warn(f"{path.name}: its model was another one: {'; '.join(different)}.")


# -- loading


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


def recognised(
    tensors: StateDict, config: Mapping[str, Any], saved: Mapping[str, Any] | None = None
) -> tuple[StateDict, Layout | None]:
    """Tensors under the names of a source that is known, with that source; without prefixes that all names share.

    The source is None where the names are ours, or nothing is known about them.
    """
    own = set(_meta(config))
    body = {k for k in own if not k.startswith("head.fc.")}
    ours = saved is not None and saved.get("backbone") == config.get("backbone")
    candidates = list(files.without_prefixes(tensors))
    for state in candidates:
        layout = next((known for known in layouts() if known.matches(set(state), config)), None)
        if body <= state.keys() or (layout is not None and not ours):
            return state, None if body <= state.keys() else layout
    return max(candidates, key=lambda state: len(own & state.keys())), None  # for the message


def load_into(
    config: dict[str, Any], path: str | Path, *, native_size: Any = None, asked: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the model of a configuration with the weights of a file, as `create_model(..., checkpoint=FILE)`.

    Args:
        config: of the model.
        path: of the file, or of a folder; see `files.read`.
        native_size: image size that the file's weights may be made for, where it says nothing itself. Weights of
            another size than the configuration's are interpolated.
        asked: entries of the configuration that were asked for, as of `apply_overrides`: what the file says of its
            head does not change these.

    Raises:
        ConfigError: an unreadable file; one that fits in no known layout: the message says which keys are missing,
            which are unexpected, and which have another shape; or a `config.json` beside it that says otherwise.
    """
    found = files.read(path)
    saved = found.model
    state, layout = recognised(found.tensors, config, saved)
    if layout is not None:
        config = apply_overrides(config, layout.changes(config))
    elif saved is not None and "head" in saved and saved.get("backbone") == config.get("backbone"):
        # a detail such as the head's order is part of what the weights mean
        given = {key: value for key, value in (asked or {}).items() if key.split(".")[0] == "head"}
        config = apply_overrides(config, {"head": saved["head"], **given})
    model = build_model(config)
    _check_source(found, layout, model)
    if layout is not None:
        state = layout.convert(state, config)
    for name, module in model.named_modules():
        rename_parameters(module, state, f"{name}." if name else "")
    state = _adapt_channels(_adapt_classes(state, model, found.file), model, config, found.file)
    sizes = [size for size in ((saved or {}).get("image_size"), native_size) if size is not None]
    if not hasattr(getattr(model, "config", None), "image_size"):
        sizes = []  # not a model of images
    state = _adapt_grid(state, model, config, sizes)
    if not _fits(state, model):
        raise _complaint(found.file, model, state, layout.name if layout else "mixerzoo")
    if saved is not None:
        _check_saved(saved, config, model, found.file)
    model.load_state_dict(state)
    return model

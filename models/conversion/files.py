"""Checkpoint files as they come: one file or shards, a folder, a trainer's own, under whatever prefix."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ConfigError
from .layouts import StateDict

METADATA = "mixerzoo_model"
PLUGINS = "mixerzoo_plugins"  # what the model needs from outside, see `plugins.needed`
# where trainers keep the weights, in the order of preference; averaged weights are those that were evaluated
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "weights",
)
# of a folder, in the order of preference
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "model.pt",
    "model.pth",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# what wrappers put into the middle of names, which means nothing
_INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _numpy_types() -> list[Any]:
    """What a pickled number or array of numpy names, of its versions 1 and 2."""
    functions = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}
    names = [(f, f"numpy.{core}.multiarray.{name}") for name, f in functions.items() for core in ("core", "_core")]
    return [*names, np.dtype, np.ndarray, *kinds]


def _plain_types() -> list[Any]:
    """Classes that hold settings or numbers and run nothing, which trainers leave beside their weights."""
    paths = [pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath]
    named = [(path, f"pathlib._local.{path.__name__}") for path in paths]  # Python 3.13's name
    containers = [argparse.Namespace, types.SimpleNamespace, collections.defaultdict, collections.deque]
    return [*containers, *paths, *named, *_numpy_types()]


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: what was given, with `~` expanded.
        tensors: by name.
        model: the configuration of a model of ours, where the file knows it.
        source: `config.json` of another source, beside the file.
        file: that was read.
        plugins: what the model needs from outside, see `plugins.needed`.
    """

    path: Path
    tensors: StateDict
    model: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    file: Path = field(default_factory=Path)
    plugins: list[dict[str, Any]] = field(default_factory=list)


def weights_of_run(run: Path) -> Path | None:
    """The weights in a run's folder that its figures are of; None without any.

    Of a run that is not finished those are the best so far, or the last.
    """
    try:
        named = json.loads((run / "summary.json").read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        named = "checkpoints/best/model.safetensors"
    last = sorted((run / "checkpoints" / "last").glob("*.safetensors"))
    return next((file for file in (run / str(named), *last) if file.is_file()), None)


def _file_in(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    weights = weights_of_run(folder)
    if weights is not None:
        return weights
    found = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    listed = ", ".join(p.name for p in found[:6]) or "none"
    raise ConfigError(
        f"checkpoint: the folder {folder} has no {_FILES[0]} and not exactly one other file of weights (found: "
        f"{listed}); give the file."
    )


def _read_safetensors(path: Path, *, tensors: bool = True) -> tuple[StateDict, dict[str, str]]:
    """Tensors and metadata."""
    with safe_open(str(path), framework="pt") as f:
        found = {k: f.get_tensor(k) for k in f.keys()} if tensors else {}  # noqa: SIM118 - not a dict
        return found, f.metadata() or {}


def _read_pickle(path: Path) -> Any:
    with torch.serialization.safe_globals(_plain_types()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_shards(path: Path) -> StateDict:
    """The files that an index names, as Hugging Face splits large models."""
    index = json.loads(path.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError("the index has no weight_map")
    tensors: StateDict = {}
    for name in sorted(set(index.values())):
        shard = path.parent / name
        if not shard.is_file():
            raise ConfigError(f"checkpoint: {path.name} names {name}, which is not beside it in {path.parent}.")
        part = _read_safetensors(shard)[0] if shard.suffix == ".safetensors" else _read_pickle(shard)
        tensors.update(part)
    missing = sorted(index.keys() - tensors.keys())
    if missing:
        raise ConfigError(f"checkpoint: the files that {path.name} names lack {', '.join(missing[:6])}.")
    return tensors


def read(path: str | Path, *, only_what_is_said: bool = False) -> Checkpoint:
    """Read a checkpoint: a file, the index of a sharded one, or a folder with either, such as a run's.

    Nothing is unpickled but tensors, plain containers, and settings and numbers that can run nothing
    (`argparse.Namespace`, paths, numbers of numpy).

    Args:
        path: of the file or folder.
        only_what_is_said: leave out the tensors of a safetensors file.

    Raises:
        ConfigError: nothing there, a damaged file, or one without tensors.
    """
    path = Path(path).expanduser()
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"checkpoint: there is no file {file}.")
    saved, plugins = None, []
    try:
        if file.suffix == ".safetensors":
            content, metadata = _read_safetensors(file, tensors=not only_what_is_said)
            saved, plugins = json.loads(metadata.get(METADATA, "null")), json.loads(metadata.get(PLUGINS, "[]"))
        elif file.suffix == ".json":
            content = _read_shards(file)
        else:
            content = _read_pickle(file)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as e:
        if isinstance(e, ConfigError):  # a ValueError, too
            raise
        raise ConfigError(f"checkpoint: {file} cannot be read as tensors ({_reason(e)}).") from e
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors and not (only_what_is_said and file.suffix == ".safetensors"):
        raise ConfigError(f"checkpoint: {file} holds no tensors by name.")
    tensors = {_INSERTED.sub("", k): v for k, v in tensors.items()}
    source = _source_config(file.parent / "config.json")
    if saved is None and source is not None and isinstance(source.get("mixerzoo"), dict):
        # saved by our wrapper for transformers
        saved, plugins, source = source["mixerzoo"], source.get("mixerzoo_plugins") or [], None
    return Checkpoint(path, tensors, saved, source, file, plugins)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if refused := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it holds {refused[1]}, which could run code of its own and is not loaded; save the state dict alone"
    return f"damaged, or not a checkpoint: {text.splitlines()[0] if text else type(error).__name__}"


def _source_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint: {path}, beside the weights, cannot be read: {error}.") from error
    return content if isinstance(content, dict) else None


def without_prefixes(tensors: StateDict) -> Iterator[StateDict]:
    """The tensors under their names, then without the first part that all names share, then without the next."""
    averaged = {k: v for k, v in tensors.items() if k != "n_averaged"}  # torch's AveragedModel counts its updates
    while True:
        yield averaged
        first = {k.partition(".")[0] for k in averaged}
        if len(first) != 1 or not all("." in k for k in averaged):
            return
        averaged = {k.partition(".")[2]: v for k, v in averaged.items()}

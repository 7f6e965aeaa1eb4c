"""Checkpoints of a run: weights as safetensors, the rest as tensors that load without unpickling code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..errors import ConfigError
from ..models import save_model
from .run_folder import plain

_MANIFEST = "manifest.json"
_FACTS = "mixerzoo_run"  # in the metadata of the weights


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_checkpoint(
    folder: Path, models: Mapping[str, nn.Module], state: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint so that at any moment a whole one, old or new, is on the disk.

    Args:
        folder: e.g. `RUN/checkpoints/last`; replaced as a whole.
        models: file stem -> model; each becomes `STEM.safetensors` and can be given to `create_model(checkpoint=...)`.
        state: tensors and plain containers, e.g. of the optimizer; becomes `state.pt`.
        facts: what the weights were trained for, such as the names of the classes; see `read_facts`.
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        if leftover.exists() and (leftover == fresh or folder.exists()):
            shutil.rmtree(leftover)
    fresh.mkdir(parents=True)
    for name, model in models.items():
        save_model(model, fresh / f"{name}.safetensors", {_FACTS: json.dumps(plain(facts))})
    if state:
        torch.save(dict(state), fresh / "state.pt")
    manifest = {path.name: _sha256(path) for path in sorted(fresh.iterdir())}
    (fresh / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    if old.exists():
        shutil.rmtree(old)


def find_checkpoint(folder: Path) -> Path | None:
    """`folder`, or what was put aside when the process died between the two renames of a save; None without either."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / _MANIFEST).is_file():
            return candidate
    return None


def verify_checkpoint(folder: Path) -> None:
    """Hold a checkpoint's files against the checksums written with them.

    Raises:
        ConfigError: a file that is missing or changed.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint: {folder / _MANIFEST} cannot be read: {error}.") from error
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"checkpoint: {path} is missing.")
        if _sha256(path) != digest:
            raise ConfigError(f"checkpoint: {path} is damaged: its SHA-256 is not the one in {_MANIFEST}.")


def load_weights(path: Path, model: nn.Module) -> None:
    """Load `STEM.safetensors` of a run into the model that it was saved from.

    Raises:
        ConfigError: an unreadable file, or one of another model.
    """
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ConfigError(f"checkpoint: {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_state(folder: Path) -> dict[str, Any]:
    """The `state.pt` of a checkpoint, on the CPU.

    Raises:
        ConfigError: unreadable.
    """
    path = folder / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ConfigError(f"checkpoint: {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def read_facts(path: str | Path) -> dict[str, Any]:
    """What a run says of its weights in their file: `task` (name and options), `classes` (names, or None),
    `preprocessing` (see `tasks.Preprocessing.describe`, or None), `data` (SHA-256), `seed` and `identity`; {} for files
    that no run wrote.

    Raises:
        ConfigError: not a safetensors file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"checkpoint: {path} cannot be read: {str(error).splitlines()[0]}") from error
    return json.loads(metadata.get(_FACTS, "{}"))

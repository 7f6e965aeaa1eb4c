"""Which data a run is of, and how a run differs from the one that a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..tasks import Task
from . import run_folder as report
from .config import NOT_IDENTITY, RunConfig

DATA = "data.json"
_SHOWN = 6  # differences, and names of classes
_FEW = 12  # up to this many classes are printed all, in their order
# What of a record tells data apart; the rest says more about them.
_TELLS = ("sha256", "sizes", "classes")


def describe_data(task: Task) -> dict[str, Any]:
    """What a run keeps of the data of an opened task, in plain containers.

    `sha256` is the task's fingerprint, `sizes` the samples by split, `classes` the names of the classes in the order of
    their numbers (None without classes), `counts` the samples of each class by split, `notes` what a person should
    know. The first three are part of a run's identity.
    """
    classes = getattr(task, "classes", None)
    counts = {}
    for split in task.splits():
        labels = None if classes is None else task.labels(split)
        if labels is not None and classes is not None:
            counts[split] = torch.bincount(labels, minlength=len(classes)).tolist()
    return {
        "sha256": task.fingerprint(),
        "sizes": {split: task.size(split) for split in task.splits()},
        "classes": None if classes is None else [str(name) for name in classes],
        "counts": counts or None,
        "notes": task.notes(),
    }


def data_lines(data: Mapping[str, Any]) -> list[str]:
    """A record of data for people: the classes with their counts, then the notes."""
    lines = []
    for split, counts in (data["counts"] or {}).items():
        pairs = list(zip(data["classes"], counts, strict=True))
        if len(pairs) > _FEW:
            pairs.sort(key=lambda pair: -pair[1])
        shown = [f"{name} {count:,}" for name, count in pairs]
        if len(pairs) > _FEW:
            shown[6:-3] = [f"... ({len(pairs) - 9} more)"]
        lines.append(f"{split}, {len(pairs)} classes: {', '.join(shown)}")
    return [*lines, *data["notes"]]


def tells(data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that tells data apart."""
    return {key: data[key] for key in _TELLS}


def data_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How data differ from those of a stored record, a phrase each; empty for the same."""
    found = []
    old, new = there.get("sizes", {}), here.get("sizes", {})
    for split in dict.fromkeys([*old, *new]):
        before, now = old.get(split), new.get(split)
        if before != now:
            found.append(f"split {split}: {_samples(before)} there, {_samples(now)} here")
    if there.get("classes") != here.get("classes"):
        found.append(f"classes: {_names(there.get('classes'))} there, {_names(here.get('classes'))} here")
    if there["sha256"] != here["sha256"]:
        found.append(f"data: SHA-256 {there['sha256'][:12]} there, {here['sha256'][:12]} here")
    return found


def _samples(size: int | None) -> str:
    return "none" if size is None else f"{size:,} samples"


def _names(classes: list[str] | None) -> str:
    if classes is None:
        return "none"
    return ", ".join(classes[:_SHOWN]) + (f", ... ({len(classes)} in all)" if len(classes) > _SHOWN else "")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _config_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    old, new = (flat({k: v for k, v in c.items() if k not in NOT_IDENTITY}) for c in (there, here))
    missing = object()
    return [
        f"{key}: {_value(old.get(key, missing), missing)} there, {_value(new.get(key, missing), missing)} here"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, missing) != new.get(key, missing)
    ]


def _value(value: Any, missing: object) -> str:
    return "not set" if value is missing else "null" if value is None else str(value)


def stored(folder: Path) -> dict[str, Any]:
    """What a run's folder says of its last start: `identity`, `code`, `outside` and `data`; None where unknown."""
    lines = report.read_lines(folder / "identity.jsonl")
    path = folder / DATA
    found = {"identity": None, "code": None, "outside": None, **(lines[-1] if lines else {})}
    return found | {"data": report.read_json(path) if path.is_file() else None}


def refuse_other_run(
    folder: Path, config: RunConfig, *, identity: str, code: str, outside: list[str], data: Mapping[str, Any]
) -> None:
    """Refuse a folder that holds another run than this one, saying in what they differ.

    Raises:
        ConfigError: the identities differ.
    """
    there = stored(folder)
    if there["identity"] == identity:
        return
    found = _config_differences(report.read_config(folder), config.as_dict())
    if there["data"] is not None:
        found += data_differences(there["data"], data)
    if there["code"] != code:
        found.append(f"code: version {str(there['code'])[:12]} there, {code[:12]} here")
    if there["outside"] is not None and there["outside"] != outside:
        found.append("code of plugins: another version")
    shown = "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    raise ConfigError(
        f"resume: {folder} holds a run of another configuration, seed, code or data: {shown or 'no identity is there'}."
    )


def refuse_other_data(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuse to continue a run on other data than it was started with.

    Raises:
        ConfigError: the data differ.
    """
    there = stored(folder)["data"]
    differences = [] if there is None else data_differences(there, data)
    if differences:
        raise ConfigError(
            f"resume: the data are no longer those that {folder} was started with: {'; '.join(differences)}. "
            "Put them back, or start a new run."
        )

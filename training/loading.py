"""What was trained, loaded in a line: `mixerzoo.load("runs/NAME")`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import plugins
from ..errors import ConfigError
from ..models import create_model, read_state_dict
from .checkpoint import read_facts
from .run_folder import read_config, read_json


@dataclass(frozen=True)
class Trained:
    """A trained model and what is known of it.

    Attributes:
        model: with its weights, in evaluation mode.
        classes: names of the classes, or None where the task has none.
        task: `name` and options of the task that it was trained on; {} where the file does not say.
        summary: of the run; {} for a lone file, and for a run that is not finished.
        weights: the file that the weights are from.
    """

    model: nn.Module
    classes: list[str] | None
    task: dict[str, Any]
    summary: dict[str, Any]
    weights: Path


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Trained:
    """Load a run's model with the weights that its figures are of: the best on validation, or the last.

    A run's folder may have been moved. A part from outside is loaded from where it was, if its code is still the same,
    else from the copy in the run's folder.

    Args:
        path: a run's folder, or a `.safetensors` file of a run or of `save_model`.
        device: where the model goes.

    Raises:
        ConfigError: no such run or file, one that is damaged, or a part from outside that is gone.
    """
    path = Path(path).expanduser()
    summary: dict[str, Any] = {}
    file = path
    if path.is_dir():
        read_config(path)  # says what is wrong with a folder that is no run's
        if (path / "summary.json").is_file():
            summary = read_json(path / "summary.json")
        _load_plugins(path)
        file = _weights(path, summary)
    elif not path.is_file():
        raise ConfigError(f"load: there is no run and no file {path}.")
    elif (path.parent.parent.parent / "plugins" / "plugins.json").is_file():
        _load_plugins(path.parent.parent.parent)
    _, config = read_state_dict(file)
    if config is None:
        raise ConfigError(
            f"load: {file} does not say which model it holds; create_model(NAME, checkpoint=FILE) is told its name."
        )
    try:
        model = create_model(config, checkpoint=file)
    except ConfigError as error:
        raise ConfigError(f"load: {file}: {error}") from error
    facts = read_facts(file)
    return Trained(model.to(device).eval(), facts.get("classes"), facts.get("task") or {}, summary, file)


def _weights(run: Path, summary: dict[str, Any]) -> Path:
    """The weights that a run's figures are of; of a run that is not finished the best so far, else the last."""
    names = [str(summary["weights"])] if summary else ["checkpoints/best/model.safetensors"]
    found = [run / name for name in names if (run / name).is_file()]
    found += sorted((run / "checkpoints" / "last").glob("*.safetensors")) if not found else []
    if not found:
        raise ConfigError(f"load: {run} holds no weights yet.")
    return found[0]


def _load_plugins(run: Path) -> None:
    """Load the parts from outside that a run used, unless they are there already."""
    path = run / "plugins" / "plugins.json"
    for code in read_json(path)["plugins"] if path.is_file() else []:
        names = {part["name"] for part in code["parts"]}
        if any(found.sha256 == code["sha256"] for found in plugins.used(names)):
            continue  # the same code is loaded
        kept = run / code["kept"]
        spec = Path(code["spec"] or "")
        if code["spec"] and spec.suffix == ".py" and (kept / spec.name).is_file():
            same = spec.is_file() and spec.read_bytes() == (kept / spec.name).read_bytes()
            plugins.load_plugins([str(spec if same else kept / spec.name)], key="load")
        elif code["spec"]:
            plugins.load_plugins([code["spec"]], key="load")
        elif names:
            said = ", ".join(f'{part["kind"]} "{part["name"]}"' for part in code["parts"])
            raise ConfigError(f"load: {run} uses the {said} of a script or a notebook; define it first, as in {kept}.")

"""What was trained, loaded in a line: `mixerzoo.load("runs/NAME")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..models import create_model
from ..models.conversion.files import weights_of_run
from ..plugins import load_kept, load_plugins
from ..tasks import Preprocessing, list_tasks, preprocessing_of
from .checkpoint import read_facts
from .run_folder import read_config, read_json


@dataclass(frozen=True)
class Trained:
    """A trained model and what is known of it.

    Attributes:
        model: with its weights, in evaluation mode.
        preprocessing: from a raw sample (an image or its path, a text, ids) to the model's input, as evaluation did it;
            see `tasks.Preprocessing`. None where the file or its task does not say.
        classes: names of the classes, or None where the task has none.
        task: `name` and options of the task that it was trained on; {} where the file does not say.
        summary: of the run; {} for a lone file, and for a run that is not finished.
        weights: the file that the weights are from.
    """

    model: nn.Module
    preprocessing: Preprocessing | None
    classes: list[str] | None
    task: dict[str, Any]
    summary: dict[str, Any]
    weights: Path


def load(path: str | Path, *, device: torch.device | str = "cpu", plugins: Sequence[str] = ()) -> Trained:
    """Load a run's model with the weights that its figures are of: the best on validation, or the last.

    A run's folder may have been moved. A part from outside is loaded from where it was, if its code is still the same,
    else from the copy in the run's folder. A lone file has no copy: it names the plugin, which you give.

        found = mixerzoo.load("runs/digits-metaformer_digits-seed0-1a2b3c4d")
        logits = found.model(found.preprocessing("seven.png")[None])
        print(found.classes[logits.argmax()])

    Args:
        path: a run's folder, or a `.safetensors` file of a run or of `save_model`.
        device: where the model goes.
        plugins: files or modules with parts of your own, that a lone file needs.

    Raises:
        ConfigError: no such run or file, one that is damaged, or a part from outside that is gone.
    """
    path = Path(path).expanduser()
    load_plugins(plugins, key="load")
    summary: dict[str, Any] = {}
    file: Path | None = path
    if path.is_dir():
        read_config(path)  # says what is wrong with a folder that is no run's
        if (path / "summary.json").is_file():
            summary = read_json(path / "summary.json")
        file = weights_of_run(path)
        if file is None:
            raise ConfigError(f"load: {path} holds no weights yet.")
        load_kept(path)
    elif not path.is_file():
        raise ConfigError(f"load: there is no run and no file {path}.")
    model = create_model(file)
    facts = read_facts(file)
    list_tasks()  # their preprocessing is known then
    return Trained(
        model=model.to(device).eval(),
        preprocessing=preprocessing_of(facts.get("preprocessing")),
        classes=facts.get("classes"),
        task=facts.get("task") or {},
        summary=summary,
        weights=file,
    )

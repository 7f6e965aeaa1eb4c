"""What a run leaves behind: a line per evaluation, a summary, a curve; and where it ran."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import ConfigError
from ..plugins import Code
from .config import PACKAGE


def plain(value: Any) -> Any:
    """NaN and infinities as strings: JSON has neither, and what cannot be read back is lost."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A mapping as an indented JSON file."""
    write_atomically(path, json.dumps(plain(values), indent=2) + "\n")


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """A mapping as a YAML file, in its order."""
    write_atomically(path, yaml.safe_dump(dict(values), sort_keys=False))


def read_config(run: Path) -> dict[str, Any]:
    """The `config.yaml` of a run's folder.

    Raises:
        ConfigError: not a run's folder, or a damaged file.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: {run} is not the folder of a run; it has no config.yaml.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"resume: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"resume: {path} is damaged.")
    return values


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """One more line of a JSON Lines file."""
    with open(path, "a") as f:
        f.write(json.dumps(plain(values)) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def runs_of(output: Path) -> dict[str, Path]:
    """The runs directly below a folder, by their identity, whatever their folders are called by now."""
    found = {}
    for path in sorted(output.glob("*/identity.jsonl")):
        lines = read_lines(path)
        if lines and "identity" in lines[-1]:
            found[lines[-1]["identity"]] = path.parent
    return found


def keep_code(folder: Path, codes: Sequence[Code]) -> list[dict[str, Any]]:
    """Write the code of parts from outside into a run's folder; returns what is said of it in the summary."""
    said = []
    for i, code in enumerate(codes):
        place = folder / "plugins" / str(i)
        for name, content in code.sources.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        parts = [{"kind": kind, "name": name} for kind, name in code.parts]
        said.append({"spec": code.spec, "parts": parts, "sha256": code.sha256, "kept": f"plugins/{i}"})
    if said:
        write_json(folder / "plugins" / "plugins.json", {"plugins": said})
    return said


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the evaluations after a step: those that a continued run will make again."""
    lines = [line for line in read_lines(path) if line["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def git_revision() -> str | None:
    """The commit of the checkout that the package lies in, with `-dirty` for changes; None outside of a checkout."""
    if not (PACKAGE / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    import timm

    from .. import __version__

    return {
        "mixerzoo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": os.environ.get("MIXERZOO_KERNELS", "auto"),
        "command": " ".join(sys.argv),
    }


def draw_curve(path: Path, lines: Sequence[Mapping[str, Any]], *, metric: str, title: str) -> None:
    """Loss and primary metric over the steps, as a PNG.

    Args:
        path: of the picture.
        lines: evaluations, with `step`, `train_loss`, `val` (its "loss" and the metric).
        metric: the primary metric.
        title: of the picture.
    """
    if not lines:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in lines]
    style = {"marker": "o", "markersize": 3, "linewidth": 1.4}
    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, [float(line["train_loss"]) for line in lines], color="#9a9a9a", label="training", **style)
    if all("loss" in line["val"] for line in lines):
        left.plot(steps, [float(line["val"]["loss"]) for line in lines], color="#1f6fb2", label="validation", **style)
    left.set(xlabel="step", ylabel="loss")
    left.legend(frameon=False, fontsize=8)
    values = [float(line["val"][metric]) for line in lines]
    right.plot(steps, values, color="#1f6fb2", **style)
    right.set(xlabel="step", ylabel=f"validation {metric}")
    right.text(0.97, 0.05, f"last {values[-1]:.4f}", transform=right.transAxes, ha="right", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path)


def read_json(path: Path) -> dict[str, Any]:
    """A mapping from a JSON file.

    Raises:
        ConfigError: a damaged file.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error

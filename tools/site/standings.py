"""Where a mixer or a family of models stands in the stored comparisons, `docs/results/*/results.csv`."""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
_KEYS = ("metric", "status")  # what follows the points of a comparison


@dataclass(frozen=True)
class Standing:
    """One arm of a comparison at one of its points.

    Attributes:
        study: name of its folder.
        title: of the report.
        point: what is varied beside the arms, e.g. `task.num_kv_pairs=4`.
        arm: its name in the report.
        mixers, model: what it was trained with.
        rank, arms: its place, from 1, among so many; None where nothing was scored.
        score: in words, e.g. `top1 0.8730 ± 0.0026`.
        cost: in words.
        reference: whether others are compared with it.
    """

    study: str
    title: str
    point: str
    arm: str
    mixers: tuple[str, ...]
    model: str
    rank: int | None
    arms: int
    score: str
    cost: str
    reference: bool


def mixers_of(command: str) -> tuple[str, ...]:
    """The mixers that a command of a report trains, names of `configs/mixer/` taken apart."""
    found = re.search(r"(?:^|[\s'\"])mixer=(\S+)", command)
    names = re.findall(r"[a-z]\w*", found.group(1)) if found else []
    return tuple(dict.fromkeys(_base(name) for name in names))


def _base(name: str) -> str:
    path = ROOT / "configs" / "mixer" / f"{name}.yaml"
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["name"]) if path.is_file() else name


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _cost(row: dict[str, str]) -> str:
    parts = []
    if row.get("time_exponent"):
        parts.append(f"a training step grows as N^{float(row['time_exponent']):.2f}")
        parts.append(f"what it keeps as N^{float(row['memory_exponent']):.2f}")
    if row.get("flops"):
        parts.append(f"{_number(float(row['flops']))} FLOPs")
    if row.get("train_throughput_median"):
        parts.append(f"{_number(float(row['train_throughput_median']))}/s in training")
    return ", ".join(parts)


def _read(folder: Path) -> list[Standing]:
    rows = list(csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines()))
    if not rows:
        return []
    title = (folder / "report.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    columns = list(rows[0])
    points = columns[1 : min(columns.index(key) for key in _KEYS)]
    found = []
    for row in rows:
        here = [r for r in rows if all(r[p] == row[p] for p in points)]
        better = [r for r in here if r["mean"] and row["mean"] and float(r["mean"]) > float(row["mean"])]
        command = row["command"]
        model = re.search(r"\bmodel=(\S+)", command)
        scored = bool(row["mean"])
        found.append(
            Standing(
                study=folder.name,
                title=title,
                point=", ".join(f"{p}={row[p]}" for p in points),
                arm=row["arm"],
                mixers=mixers_of(command),
                model=model.group(1) if model else "",
                rank=len(better) + 1 if scored else None,
                arms=len(here),
                score=f"{row['metric']} {float(row['mean']):.4f} ± {float(row['sd'] or 0):.4f}" if scored else "",
                cost=_cost(row),
                reference=not row["difference"] and scored,
            )
        )
    return found


@functools.cache
def all_standings() -> tuple[Standing, ...]:
    """Every arm of every stored comparison."""
    return tuple(one for path in sorted(RESULTS.glob("*/results.csv")) for one in _read(path.parent))


def of_mixer(name: str) -> list[Standing]:
    """Where a mixer was an arm."""
    return [one for one in all_standings() if name in one.mixers]


def of_models(names: tuple[str, ...]) -> list[Standing]:
    """Where one of some models was the backbone."""
    return [one for one in all_standings() if one.model in names]

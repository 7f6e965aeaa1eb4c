"""Reports of run folders that no ablation planned: grouped into arms by their configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....errors import ConfigError, unknown
from ... import run_folder as report
from ...config import NOT_IDENTITY, RunConfig, parse
from ...identity import data_differences
from ..plan import PLAN, Cell, Job, Plan
from ..preset import Ablation


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The finished runs among folders and directly below them.

    Raises:
        ConfigError: a folder that does not exist or holds none.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder.")
        here = (
            [folder] if (folder / "summary.json").exists() else sorted(p.parent for p in folder.glob("*/summary.json"))
        )
        if not here:
            raise ConfigError(f"{folder}: no finished run (summary.json) is there, nor an ablation ({PLAN}).")
        found += here
    return list(dict.fromkeys(found))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _group_key(config: RunConfig) -> str:
    values = {k: v for k, v in config.as_dict().items() if k not in (*NOT_IDENTITY, "seed")}
    values["optimizer"] = {k: v for k, v in config.optimizer.items() if k != "lr"}
    return json.dumps(values, sort_keys=True)


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Names of arms: the mixer's or model's, and what else tells those of one name apart."""
    names = [str((c.mixer or {}).get("name") or c.model_name or "model") for c in configs]
    flat = [_flat(json.loads(_group_key(c))) for c in configs]
    done = []
    for i, name in enumerate(names):
        alike = [flat[j] for j, other in enumerate(names) if other == name]
        keys = sorted({k for f in alike for k in f if any(f.get(k) != g.get(k) for g in alike)})
        extra = [f"{key}={flat[i].get(key)}" for key in keys[:3]]
        done.append(", ".join([name, *extra]))
    return [n if done.count(n) == 1 else f"{n} #{done[:i].count(n) + 1}" for i, n in enumerate(done)]


def _refuse_other_data(runs: Sequence[tuple[Path, RunConfig, dict[str, Any]]]) -> None:
    """Refuse runs of one task whose data changed between them."""
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder, config, summary in runs:
        there, data = first.setdefault(json.dumps(config.task, sort_keys=True), (folder, summary["data"]))
        differences = data_differences(data, summary["data"])
        if differences:
            raise ConfigError(
                f"the runs are of different data: {there} (there) and {folder} (here): {'; '.join(differences)}. They "
                "cannot share a table."
            )


def plan_of(folders: Sequence[Path], *, reference: str | None = None, title: str = "", out: Path) -> Plan:
    """A plan that holds exactly the runs in some folders. Runs that differ only in seed and learning rate are one arm.

    Args:
        folders: of runs, or of folders of runs.
        reference: arm to compare with; by default the first.
        title: of the report.
        out: where the report goes.

    Raises:
        ConfigError: no runs, several metrics, data that changed between runs, or an unknown reference.
    """
    runs = find_runs(folders)
    groups: dict[str, list[tuple[Path, RunConfig, dict[str, Any]]]] = {}
    for folder in runs:
        config, summary = parse(report.read_config(folder)), report.read_json(folder / "summary.json")
        groups.setdefault(_group_key(config), []).append((folder, config, summary))
    metrics = {summary["metric"] for members in groups.values() for _, _, summary in members}
    if len(metrics) > 1:
        raise ConfigError(f"the runs have several metrics, {', '.join(sorted(metrics))}: they cannot share a table.")
    _refuse_other_data([run for members in groups.values() for run in members])
    names = _names([members[0][1] for members in groups.values()])
    if reference is not None and reference not in names:
        raise unknown("--reference", reference, names)
    cells = []
    for name, members in zip(names, groups.values(), strict=True):
        cell = Cell(
            name, {}, [], members[0][1], members[0][2]["data"], recorded=members[0][2]["environment"].get("command", "")
        )
        for folder, config, summary in members:
            cell.jobs.append(Job(cell, config.optimizer["lr"], config.seed, config, summary["identity"], folder))
        cells.append(cell)
    everything = [job for cell in cells for job in cell.jobs]
    ablation = Ablation(
        name="runs",
        title=title or "Runs side by side",
        mixers=names,
        reference=reference or names[0],
        seeds=sorted({job.seed for job in everything}),
        lr=sorted({float(job.lr) for job in everything}),
        match="off",
        lr_seeds=len({job.seed for job in everything}),
    )
    codes = {summary["code"] for members in groups.values() for _, _, summary in members}
    code = codes.pop() if len(codes) == 1 else "several versions"
    return Plan(ablation, cells, code, out, ablation.lr, given=True)

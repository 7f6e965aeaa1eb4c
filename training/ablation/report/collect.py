"""From finished runs to the figures of a report; everything that is shown is computed here, once."""

from __future__ import annotations

import math
import statistics as std
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ... import run_folder as report
from ...identity import data_differences
from ..claims import judge, parse
from ..plan import Cell, Job, Plan, open_task
from ..work import best_rate, failure, rates_of
from .statistics import ENOUGH_SEEDS, holm, paired_p, summarise

# What a run's summary counts. Smaller is cheaper for all of them.
COUNTED = ("parameters", "flops", "activation_bytes")
COSTS = "costs.json"


def collect(plan: Plan) -> dict[str, Any]:
    """All figures of an ablation, in plain containers.

    Runs that are not finished are missing, and named in `warnings`.
    """
    measured = _measured(plan.folder)
    cells = [_cell(plan, cell, measured.get("cells", {}).get(cell.label, {})) for cell in plan.cells]
    facts = next((run["summary"] for cell in cells for run in cell["runs"]), None)
    results: dict[str, Any] = {
        "name": plan.ablation.name,
        "title": plan.ablation.title or f"Ablation {plan.ablation.name}",
        "description": plan.ablation.description,
        "reference": plan.ablation.reference,
        "controls": [c for c in plan.ablation.controls if c in plan.ablation.mixers],
        "vary": plan.ablation.vary,
        "seeds": plan.ablation.seeds,
        "rates": plan.rates,
        "lr_seeds": plan.ablation.lr_seeds,
        "match": plan.ablation.match,
        "tolerance": plan.ablation.tolerance,
        "code": plan.code,
        "git": report.read_json(plan.folder / "plan.json").get("git") if (plan.folder / "plan.json").exists() else None,
        "folder": str(plan.folder),
        "given": plan.given,
        "trains": bool(plan.ablation.seeds),
        "scaling": measured.get("scaling"),
        "measured_on": measured.get("environment"),
        "measured_with": measured.get("settings"),
    }
    if facts is not None:
        results |= {key: facts[key] for key in ("metric", "higher_is_better", "split", "task", "environment", "data")}
        results["unit"] = facts["throughput"]["unit"].partition("/")[0]
    else:
        unit = open_task(plan.cells[0].config).unit
        results |= {"metric": "score", "higher_is_better": True, "split": "test", "task": None, "unit": unit}
        results |= {"environment": report.environment(), "data": None}
    for point in plan.ablation.points():
        _compare([c for c in cells if c["point"] == point], str(plan.ablation.reference))
    results["warnings"] = _warnings(plan, cells)
    results["claim"] = None if plan.ablation.claim is None else asdict(plan.ablation.claim)
    for cell in cells:
        for run in cell["runs"]:
            del run["summary"]
    results["cells"] = cells
    results["verdicts"] = [
        asdict(judge(parse(line, key=f"ablation.expect[{i}]"), results, key=f"ablation.expect[{i}]"))
        for i, line in enumerate(plan.ablation.expect)
    ]
    return results


def _measured(folder: Path) -> dict[str, Any]:
    path = folder / COSTS
    return report.read_json(path) if path.exists() else {}


def _read(job: Job) -> dict[str, Any] | None:
    path = job.folder / "summary.json"
    return report.read_json(path) if path.exists() else None


def _cell(plan: Plan, cell: Cell, measured: Mapping[str, Any]) -> dict[str, Any]:
    summaries = {job.identity: _read(job) for job in cell.jobs}
    failures = [(job, problem) for job in cell.jobs if (problem := failure(plan, job)) is not None]
    rates, chosen = _rates(plan, cell, summaries)
    jobs = [job for job in cell.jobs if job.lr == chosen]
    runs = []
    for job in jobs:
        summary = summaries[job.identity]
        if summary is not None:
            runs.append(
                {
                    "seed": job.seed,
                    "value": float(summary["value"]),
                    "val": float(summary["best"]["value"]),
                    "seconds": summary["train_seconds"],
                    "folder": job.folder.name,
                    "summary": summary,
                }
            )
    values = summarise([run["value"] for run in runs])
    lr = chosen if chosen is not None else cell.config.optimizer["lr"]
    status = "done" if runs and len(runs) == len(jobs) else "partial" if runs else "failed" if failures else "missing"
    if not cell.jobs:
        status = "measured" if measured else "missing"
    first = runs[0]["summary"] if runs else {}
    return {
        "arm": cell.arm,
        "label": cell.label,
        "point": cell.point,
        "status": status,
        "lr": chosen,
        "rates": rates,
        "runs": runs,
        "mean": values.mean,
        "sd": values.sd,
        "low": values.low,
        "high": values.high,
        "matched": _matched(cell),
        "costs": {**{key: first[key] for key in COUNTED if key in first}, **_speed(runs), **measured},
        "curve": _curve(jobs),
        "failures": [{"label": job.label, **problem} for job, problem in failures],
        "command": cell.command(lr, cell.jobs[0].seed if cell.jobs else cell.config.seed),
        "config": yaml.safe_dump(_shown(cell), sort_keys=False, width=100),
    }


def _shown(cell: Cell) -> dict[str, Any]:
    values = cell.config.as_dict()
    return {key: values[key] for key in ("model", "mixer", "task", "optimizer", "train") if values[key] is not None}


def _matched(cell: Cell) -> dict[str, Any] | None:
    found = cell.matched
    if found is None:
        return None
    return {
        "count": found.count,
        "target": found.target,
        "own": found.own,
        "difference": found.difference,
        "within": found.within,
        "settings": found.settings,
        "why": found.why,
    }


def _rates(
    plan: Plan, cell: Cell, summaries: Mapping[str, dict[str, Any] | None]
) -> tuple[list[dict[str, Any]], float | None]:
    """What each learning rate reached on validation, and which one won."""
    rates, first = rates_of(cell), plan.ablation.seeds[: plan.ablation.lr_seeds]
    found, scores = [], {}
    for rate in rates:
        jobs = [job for job in cell.jobs if job.lr == rate and job.seed in first]
        known = [s for job in jobs if (s := summaries[job.identity]) is not None]
        values = [float(s["best"]["value"]) for s in known]
        whole = len(values) == len(jobs) and bool(values)
        mean = std.fmean(values) if whole else math.nan
        found.append({"lr": rate, "val": mean})
        if whole:
            scores[rate] = mean if known[0]["higher_is_better"] else -mean
    if len(rates) < 2:
        return found, rates[0] if rates else None
    return found, best_rate({rate: scores.get(rate) for rate in rates})


def _speed(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Throughput while the runs trained; where it was measured side by side as well, that one is to be believed."""
    rates = [run["summary"]["throughput"] for run in runs]
    rates = [r for r in rates if isinstance(r["median"], float) and math.isfinite(r["median"])]
    if not rates:
        return {}
    middle = {key: std.median(rate[key] for rate in rates) for key in ("median", "p25", "p75")}
    return {"observed_throughput": middle}


def _curve(jobs: Sequence[Job]) -> list[dict[str, float]]:
    """Validation over the steps: mean, and the range over the seeds."""
    steps: dict[int, list[float]] = {}
    losses: dict[int, list[float]] = {}
    for job in jobs:
        if not (job.folder / "summary.json").exists():
            continue
        metric = report.read_json(job.folder / "summary.json")["metric"]
        for line in report.read_lines(job.folder / "metrics.jsonl"):
            steps.setdefault(line["step"], []).append(float(line["val"][metric]))
            losses.setdefault(line["step"], []).append(float(line["train_loss"]))
    return [
        {
            "step": step,
            "mean": std.fmean(values),
            "low": min(values),
            "high": max(values),
            "loss": std.fmean(losses[step]),
        }
        for step, values in sorted(steps.items())
    ]


def _compare(cells: Sequence[dict[str, Any]], reference: str) -> None:
    """Differences to the reference arm, paired over the seeds that both have."""
    base = next((cell for cell in cells if cell["arm"] == reference), None)
    others = [cell for cell in cells if cell is not base]
    known = {} if base is None else {run["seed"]: run["value"] for run in base["runs"]}
    p_values = []
    for cell in others:
        paired = [run["value"] - known[run["seed"]] for run in cell["runs"] if run["seed"] in known]
        spread = summarise(paired)
        cell["difference"] = {
            "mean": spread.mean,
            "low": spread.low,
            "high": spread.high,
            "pairs": len(paired),
            "p": paired_p(paired),
        }
        p_values.append(cell["difference"]["p"])
    for cell, p in zip(others, holm(p_values), strict=True):
        cell["difference"]["p_holm"] = p
    if base is not None:
        base["difference"] = None


def _warnings(plan: Plan, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for cell in cells:
        match = cell["matched"]
        if match is not None and not match["within"]:
            found.append(
                f"{cell['label']}: {plan.ablation.match} not matched ({match['difference']:+.1%}): {match['why']}."
            )
    for cell in cells:
        found += [f"{f['label']}: {f['kind']}: {f['error']}" for f in cell["failures"]]
        missing = len(plan.ablation.seeds) - len(cell["runs"])
        if plan.ablation.seeds and missing > 0:
            found.append(f"{cell['label']}: {missing} of {len(plan.ablation.seeds)} runs are missing.")
    edge = [c["label"] for c in cells if len(c["rates"]) > 2 and c["lr"] in (min(plan.rates), max(plan.rates))]
    if edge:
        found.append(
            f"The best learning rate is the first or last of the grid for {', '.join(edge)}: "
            "a wider grid may do better."
        )
    for point in plan.ablation.points():
        here = [cell for cell in plan.cells if cell.point == point]
        other = [cell for cell in here if data_differences(here[0].data, cell.data)]
        if other:
            found.append(
                f"Not of one set of data: {', '.join(cell.label for cell in other)}, and {here[0].label}: "
                f"{'; '.join(data_differences(here[0].data, other[0].data))}."
            )
    seeds = len(plan.ablation.seeds)
    if 0 < seeds < ENOUGH_SEEDS and len(cells) > 1:
        found.append(
            f"{seeds} seed{'s are' if seeds > 1 else ' is'} few: p-values and intervals over fewer than {ENOUGH_SEEDS} "
            "seeds are rough, small differences are not shown by them."
        )
    if plan.ablation.reference not in plan.ablation.mixers:
        found.append(f"The reference arm {plan.ablation.reference} is not among the arms.")
    return found

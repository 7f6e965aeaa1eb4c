"""From an ablation to its runs: arms at points, matched, each with its configuration and its command."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...tasks import Task
from .. import run_folder as report
from ..cli.compose import OWN, compose_config
from ..cli.program import program
from ..config import RunConfig, code_version, identity, parse, run_name
from ..identity import data_differences, describe_data, tells
from ..prepare import check, make_task
from ..quoting import literal
from .match import Matched, count, match
from .preset import Ablation, make

PLAN = "plan.json"
# Runs of a sweep write no tracker's files unless asked; metrics.jsonl holds the same.
QUIET = ["tracker=null", "progress=false"]


@dataclass(eq=False)
class Job:
    """One run: its configuration and where it is written."""

    cell: Cell
    lr: float
    seed: int
    config: RunConfig
    identity: str
    folder: Path

    @property
    def label(self) -> str:
        """For progress."""
        return f"{self.cell.label}, lr {self.lr:g}, seed {self.seed}"


@dataclass(eq=False)
class Cell:
    """An arm at a point.

    Attributes:
        arm: its name.
        point: what varies -> its value here.
        settings: the command line of `train.py` without seed and learning rate.
        config: with the first seed and learning rate.
        data: record of its data, see `describe_data`.
        matched: what the search for an equal size found; None when nothing is matched.
        recorded: for runs that were found, not planned: the command line that made them.
    """

    arm: str
    point: dict[str, Any]
    settings: list[str]
    config: RunConfig
    data: dict[str, Any]
    matched: Matched | None = None
    recorded: str = ""
    jobs: list[Job] = field(default_factory=list, repr=False)

    @property
    def label(self) -> str:
        """The arm and its point, for people."""
        return ", ".join([self.arm, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.point.items())])

    def command(self, lr: float, seed: int) -> str:
        """The command line that repeats a run, and gives it the same identity."""
        if self.recorded:
            return self.recorded
        return f"{program()} {shlex.join([*self.settings, f'optimizer.lr={lr!r}', f'seed={seed}'])}"


@dataclass(eq=False)
class Plan:
    """All runs of an ablation.

    Attributes:
        ablation: what was asked.
        cells: arms at points, points in the outer order.
        code: version of the code.
        folder: of the ablation; runs lie beside it.
        rates: learning rates that are tried.
        given: the runs were found, not planned.
    """

    ablation: Ablation
    cells: list[Cell]
    code: str
    folder: Path
    rates: list[float]
    given: bool = False

    def jobs(self) -> list[Job]:
        """All possible runs; those of rates that lose on validation are made for the first seeds only."""
        return [job for cell in self.cells for job in cell.jobs]


@lru_cache(maxsize=2)
def _opened(options: str) -> tuple[Task, dict[str, Any]]:
    from ...tasks import create_task

    values = json.loads(options)
    task = create_task(values.pop("name"), **values)
    task.open()
    return task, describe_data(task)


def open_data(config: RunConfig) -> tuple[Task, dict[str, Any]]:
    """The task of a configuration, opened, and the record of its data; the last ones are kept, as arms share them."""
    if "name" not in config.task:
        make_task(config).open()  # says what is wrong
    return _opened(json.dumps(config.task, sort_keys=True))


def open_task(config: RunConfig) -> Task:
    """The task of a configuration, opened; see `open_data`."""
    return open_data(config)[0]


def arm_settings(ablation: Ablation, arm: str) -> list[str]:
    """An arm's settings as a command line, its mixer first.

    Raises:
        ConfigError: a value that is no setting.
    """
    settings = {"mixer": arm, **(ablation.arms.get(arm) or {})}
    done = []
    for key, value in settings.items():
        if key == "mixer" and value is None:
            value = OWN
        text = value if key == "mixer" and isinstance(value, str) else literal(value)
        done.append(f"{key}={text}")
    return [text for text in done if text != f"mixer={OWN}"]


def once(settings: Sequence[str]) -> list[str]:
    """A command line with each key once, at its last value."""
    last = {text.partition("=")[0]: text for text in settings}
    return list(last.values())


def _compose(settings: Sequence[str], *, arm: str) -> RunConfig:
    try:
        return compose_config([*settings, *QUIET])
    except ConfigError as error:
        raise ConfigError(f"{error} (in the arm {arm})") from error


def _cell(ablation: Ablation, arm: str, point: Mapping[str, Any], target: int | None) -> tuple[Cell, int | None]:
    varied = [f"{key}={literal(value)}" for key, value in point.items()]
    settings = once([*ablation.base, *arm_settings(ablation, arm), *varied])
    config = _compose(settings, arm=arm)
    if not ablation.seeds:
        config = replace(config, seed=0)
    task, data = open_data(config)
    found = None
    try:
        if ablation.match != "off":
            if target is None:
                target = count(config, task, ablation.match)
            found = match(
                config, task, target, by=ablation.match, tolerance=ablation.tolerance, step=ablation.width_step
            )
            if found.settings:
                changed = [f"model.{key}={literal(value)}" for key, value in found.settings.items()]
                settings = once([*settings, *changed])
                config = _compose(settings, arm=arm)
        check(config, task)
    except ConfigError as error:
        raise ConfigError(f"{error} (in the arm {arm})") from error
    return Cell(arm, dict(point), settings, config, data, found), target


def make_plan(ablation: Ablation) -> Plan:
    """Compose, match and check all arms; nothing is written.

    Raises:
        ConfigError: an arm that cannot be composed or built, naming it.
    """
    code = code_version()
    _opened.cache_clear()  # data may have changed since the last plan of this process
    cells: list[Cell] = []
    for point in ablation.points():
        target = None
        first = [ablation.reference] if ablation.reference in ablation.mixers else []
        here = {}
        for arm in dict.fromkeys([*first, *ablation.mixers]):
            here[arm], target = _cell(ablation, str(arm), point, target)
        cells += [here[arm] for arm in ablation.mixers]
    output = Path(cells[0].config.output_dir)
    rates = ablation.lr or [cells[0].config.optimizer["lr"]]
    known = report.runs_of(output)
    for cell in cells:
        for rate in ablation.lr or [cell.config.optimizer["lr"]]:
            for seed in ablation.seeds:
                cell.jobs.append(_job(cell, rate, seed, code, known))
    folder = Path(ablation.dir) if ablation.dir else output / f"ablation-{ablation.name}-{_hash(ablation, cells, code)}"
    return Plan(ablation, cells, code, folder, rates)


def _job(cell: Cell, rate: float, seed: int, code: str, known: Mapping[str, Path]) -> Job:
    config = replace(cell.config, seed=seed, optimizer={**cell.config.optimizer, "lr": rate}, resume="auto")
    identifier = identity(config, code, tells(cell.data))
    folder = Path(config.output_dir) / run_name(config, identifier)
    if not folder.exists():  # it may have been renamed
        folder = known.get(identifier, folder)
    return Job(cell, rate, seed, config, identifier, folder)


def _hash(ablation: Ablation, cells: Sequence[Cell], code: str) -> str:
    runs = [
        [cell.arm, identity(cell.config, code, tells(cell.data)), [job.identity for job in cell.jobs]] for cell in cells
    ]
    text = json.dumps([ablation.what(), runs, code], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_plan(plan: Plan) -> None:
    """Write what the report needs to know into the ablation's folder.

    Raises:
        ConfigError: the folder, given by `ablation.dir`, holds another ablation.
    """
    digest = _hash(plan.ablation, plan.cells, plan.code)
    path = plan.folder / PLAN
    if path.exists() and report.read_json(path)["hash"] != digest:
        raise ConfigError(f"ablation.dir: {plan.folder} holds another ablation{_why_another(plan, path)}.")
    if not path.exists() and plan.folder.exists() and any(plan.folder.iterdir()):
        raise ConfigError(f"ablation.dir: {plan.folder} is not empty and holds no ablation.")
    plan.folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for cell in plan.cells:
        runs = [
            {"lr": job.lr, "seed": job.seed, "identity": job.identity, "folder": job.folder.name} for job in cell.jobs
        ]
        cells.append(
            {
                "arm": cell.arm,
                "label": cell.label,
                "point": cell.point,
                "settings": cell.settings,
                "config": cell.config.as_dict(),
                "data": cell.data,
                "matched": None if cell.matched is None else asdict(cell.matched),
                "runs": runs,
            }
        )
    values = {
        "hash": digest,
        "code": plan.code,
        "git": report.git_revision(),
        "ablation": plan.ablation.what(),
        "asked": plan.ablation.asked(),
        "rates": plan.rates,
        "cells": cells,
    }
    report.write_json(path, values)


def _why_another(plan: Plan, path: Path) -> str:
    """How a stored plan differs, where arms and settings do not tell."""
    stored = report.read_json(path)
    if stored["ablation"] != json.loads(json.dumps(plan.ablation.what(), default=str)):
        return ""
    there = {entry["label"]: entry["data"] for entry in stored["cells"]}
    for cell in plan.cells:
        if cell.label in there and (found := data_differences(there[cell.label], cell.data)):
            return f", of other data: {'; '.join(found)} ({cell.label})"
    return ", of another version of the code" if stored["code"] != plan.code else ", of other settings"


def load_plan(folder: Path) -> Plan:
    """The plan in an ablation's folder.

    Raises:
        ConfigError: none there, or a damaged one.
    """
    path = folder / PLAN
    if not path.is_file():
        raise ConfigError(f"ablation: {folder} is not the folder of an ablation; it has no {PLAN}.")
    values = report.read_json(path)
    known = None
    try:
        cells = []
        for entry in values["cells"]:
            found = None if entry["matched"] is None else Matched(**entry["matched"])
            config = parse(entry["config"])
            cell = Cell(entry["arm"], entry["point"], entry["settings"], config, entry["data"], found)
            known = report.runs_of(Path(config.output_dir)) if known is None else known
            cell.jobs = [_job(cell, run["lr"], run["seed"], values["code"], known) for run in entry["runs"]]
            cells.append(cell)
        ablation = make(values["ablation"] | values.get("asked", {}))
        return Plan(ablation, cells, values["code"], folder, values["rates"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"ablation: {path} is damaged: {error!r}") from error

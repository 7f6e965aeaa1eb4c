"""Doing the runs of a plan: any number of processes take what is neither done nor taken."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .. import run_folder as report
from ..config import code_version
from ..identity import data_differences
from ..loop import DivergedError
from ..run import run
from .locks import try_lock
from .plan import Cell, Job, Plan, open_data

_POLL = 2.0  # seconds between looks at what other processes hold

# Called with "running", "done", "failed" or "waiting" and the run; None while waiting.
Listener = Callable[[str, Job | None], None]


def status_path(folder: Path, identity: str) -> Path:
    """Where the outcome of a run that did not finish is kept, in the ablation's folder."""
    return folder / "failed" / f"{identity}.json"


def lock_path(job: Job) -> Path:
    """The lock of a run, beside the runs, as ablations share them."""
    return job.folder.parent / ".locks" / job.identity


def is_done(job: Job) -> bool:
    """Whether the run has a summary."""
    return (job.folder / "summary.json").exists()


def failure(plan: Plan, job: Job) -> dict[str, Any] | None:
    """What went wrong in a run, in this ablation or another one that shares it; None if nothing did."""
    path = status_path(plan.folder, job.identity)
    return report.read_json(path) if path.exists() else None


class Board:
    """Which runs are left, re-read from the disk; what is done stays done and is asked once.

    Args:
        plan: of the ablation.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.done: set[str] = set()
        self.failed: dict[str, dict[str, Any]] = {}

    def refresh(self, job: Job) -> bool:
        """Whether a run is over, well or badly."""
        if job.identity in self.done or job.identity in self.failed:
            return True
        if is_done(job):
            self.done.add(job.identity)
            return True
        problem = failure(self.plan, job)
        if problem is not None:
            self.failed[job.identity] = problem
        return problem is not None

    def chosen(self, cell: Cell) -> float | None:
        """The learning rate that won on validation; None while runs that decide it are open, or if all failed."""
        deciding = self.deciding(cell)
        if not all(self.refresh(job) for job in deciding):
            return None
        scores = {rate: self.score([j for j in deciding if j.lr == rate]) for rate in rates_of(cell)}
        return best_rate(scores)

    def deciding(self, cell: Cell) -> list[Job]:
        """The runs that decide the learning rate of an arm; none where there is only one."""
        rates = rates_of(cell)
        if len(rates) < 2:
            return []
        first = self.plan.ablation.seeds[: self.plan.ablation.lr_seeds]
        return [job for job in cell.jobs if job.seed in first]

    def score(self, jobs: list[Job]) -> float | None:
        """Mean of the best validation values, larger is better; None if a run failed."""
        values = []
        for job in jobs:
            if job.identity in self.failed:
                return None
            summary = report.read_json(job.folder / "summary.json")
            value = float(summary["best"]["value"])
            values.append(value if summary["higher_is_better"] else -value)
        return sum(values) / len(values)

    def needed(self) -> list[Job]:
        """The runs that are known to be needed, first seeds of all arms first."""
        found: list[tuple[int, Job]] = []
        for cell in self.plan.cells:
            rates = rates_of(cell)
            deciding = self.deciding(cell)
            rate = rates[0] if len(rates) == 1 else self.chosen(cell)
            seeds = self.plan.ablation.seeds
            found += [(seeds.index(job.seed), job) for job in deciding]
            if rate is not None:
                rest = [job for job in cell.jobs if job.lr == rate and job not in deciding]
                found += [(seeds.index(job.seed), job) for job in rest]
        return [job for _, job in sorted(found, key=lambda pair: pair[0])]

    def expected(self) -> int:
        """How many runs there will be when all learning rates are chosen."""
        total = 0
        for cell in self.plan.cells:
            seeds, first = len(self.plan.ablation.seeds), self.plan.ablation.lr_seeds
            rates = len(rates_of(cell))
            total += seeds if rates < 2 else rates * first + seeds - first
        return total


def rates_of(cell: Cell) -> list[float]:
    """The learning rates of an arm, in their order."""
    return list(dict.fromkeys(job.lr for job in cell.jobs))


def best_rate(scores: dict[float, float | None]) -> float | None:
    """The rate with the best score, of equals the first; None if none has one."""
    known = {rate: score for rate, score in scores.items() if score is not None and score == score}
    return max(known, key=lambda rate: known[rate], default=None)


def execute(plan: Plan, job: Job) -> dict[str, Any] | None:
    """One run; returns its failure, which is also written down, or None.

    Raises:
        loop.Interrupted: a signal came; the run's state is saved.
    """
    path = status_path(plan.folder, job.identity)
    try:
        task, data = open_data(job.config)
        check_data(job, data)
        run(job.config, task=task, code=plan.code, data=data, quiet=True)
    except DivergedError as error:
        problem = {"kind": "diverged", "error": str(error), "trace": ""}
    except ConfigError as error:
        problem = {"kind": "refused", "error": str(error), "trace": ""}
    except Exception as error:  # whatever one arm does, the others go on; it is reported
        problem = {"kind": "crashed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    else:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(path, {**problem, "label": job.label, "folder": job.folder.name})
    return problem


def forget_failures(plan: Plan) -> None:
    """Let runs that failed be made again: all with `ablation.retry`, else those that crashed."""
    for job in plan.jobs():
        problem = failure(plan, job)
        if problem is not None and (plan.ablation.retry or problem["kind"] == "crashed"):
            status_path(plan.folder, job.identity).unlink(missing_ok=True)


def _free(board: Board) -> Iterator[Job]:
    for job in board.needed():
        if not board.refresh(job):
            yield job


def work(plan: Plan, listener: Listener = lambda *_: None) -> None:
    """Do runs until none is left, those that other processes are at included.

    Raises:
        ConfigError: the code on the disk is no longer the one that was planned with.
        loop.Interrupted: a signal came.
    """
    board = Board(plan)
    while True:
        open_jobs = list(_free(board))
        if not open_jobs:
            return
        if not any(_take(plan, job, listener) for job in open_jobs):
            listener("waiting", None)
            time.sleep(_POLL)


def _take(plan: Plan, job: Job, listener: Listener) -> bool:
    """Do a run if no other process is at it; whether it was done here."""
    with try_lock(lock_path(job)) as mine:
        if not mine:
            return False
        if is_done(job) or failure(plan, job) is not None:  # done by another process since the last look
            return True
        listener("running", job)
        problem = execute(plan, job)
    listener("failed" if problem else "done", job)
    return True


def check_data(job: Job, data: dict[str, Any]) -> None:
    """Refuse a run whose data are no longer those that were planned with: a table is of one set of data.

    Raises:
        ConfigError: saying what differs.
    """
    differences = data_differences(job.cell.data, data)
    if differences:
        raise ConfigError(
            f"task: the data changed since the ablation was started: {'; '.join(differences)}. Start it again for a "
            "table of the new data."
        )


def check_code(plan: Plan) -> None:
    """Raise a ConfigError if this process would not run the code that was planned with."""
    if code_version() != plan.code:
        raise ConfigError("the code changed while the ablation was started; start it again.")

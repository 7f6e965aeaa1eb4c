"""An ablation from its command line to its report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .costs import measure
from .display import SweepDisplay
from .launch import launch, worker_threads
from .locks import try_lock
from .plan import Plan, load_plan, make_plan, write_plan
from .preset import Ablation, from_command_line
from .report.build import build_report
from .report.collect import COSTS
from .report.text import verdict_text
from .work import Board, check_code, forget_failures, work


def ablate(ablation: Ablation, *, progress: bool = True) -> dict[str, Any]:
    """Make all runs of an ablation that are not made yet, measure the costs, and write the report.

    Args:
        ablation: what is compared.
        progress: show how far it is.

    Returns:
        The figures, see `collect`.

    Raises:
        ConfigError: an arm that cannot be built, before any run.
        loop.Interrupted: a signal came; the same command goes on.
    """
    plan = make_plan(ablation)
    write_plan(plan)
    check_code(plan)
    return carry_out(plan, progress=progress)


def carry_out(plan: Plan, *, progress: bool = True) -> dict[str, Any]:
    """As `ablate`, for a plan that is written."""
    forget_failures(plan)
    display = SweepDisplay(plan, enabled=progress)
    display.say(f"{plan.ablation.name}: {len(plan.cells)} arms, {display.watch.expected} runs; {plan.folder}")
    for cell in plan.cells:
        if cell.matched is not None and not cell.matched.within:
            display.say(f"{cell.label}: {plan.ablation.match} not matched: {cell.matched.why}")
    before = torch.get_num_threads()
    with display.running():
        if plan.ablation.launcher == "local":
            if plan.ablation.threads:
                torch.set_num_threads(plan.ablation.threads)
            try:
                work(plan, display.event)
            finally:
                torch.set_num_threads(before)
        else:
            with display.polling():
                problems = launch(plan)
            for problem in problems:
                display.say(problem)
    return conclude(plan, display)


def conclude(plan: Plan, display: SweepDisplay) -> dict[str, Any]:
    """The report of the runs that are made, by whomever, and the costs when none is left."""
    board = Board(plan)
    left = [job for job in board.needed() if not board.refresh(job)]
    if left:
        display.say(f"{len(left)} runs are left: all workers ended before. The same command goes on.")
    return finish(plan, display, complete=not left)


def finish(plan: Plan, display: SweepDisplay, *, complete: bool) -> dict[str, Any]:
    """Measure the costs, when all runs are made, and write the report; in one process at a time."""
    with try_lock(plan.folder / ".report.lock") as mine:
        if not mine:
            display.say(f"another process writes the report in {plan.folder}")
            return {}
        if complete and plan.ablation.costs and not (plan.folder / COSTS).exists():
            measure(plan, display.say)
        results = build_report(plan)
    display.table(results)
    for verdict in results["verdicts"]:
        display.say(f"{verdict['text']}: {verdict['verdict']}. {verdict_text(verdict)}")
    for warning in results["warnings"]:
        display.say(f"note: {warning}")
    display.say(f"report: {plan.folder / 'report.md'}")
    return results


def main(overrides: Sequence[str]) -> int:
    """Run the ablation of a command line; returns the exit code: 0, or 1 when an arm has no result.

    Raises:
        ConfigError: a mistake in it.
    """
    worker = [text.partition("=")[2] for text in overrides if text.startswith("ablation.worker=")]
    if worker:
        plan = load_plan(Path(worker[-1].strip("'\"")))
        check_code(plan)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or worker_threads(plan))
        work(plan)
        return 0
    results = ablate(from_command_line(overrides))
    lost = [cell["label"] for cell in results.get("cells", []) if cell["status"] in ("failed", "missing")]
    if lost and results.get("trains"):
        print(f"no result for {', '.join(lost)}", file=sys.stderr)
        return 1
    return 0

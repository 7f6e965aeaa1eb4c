"""Writing the report of an ablation, or of any set of run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import report
from .collect import collect
from .html import page
from .plan import Plan
from .text import markdown, results_csv


def build_report(plan: Plan, folder: Path | None = None) -> dict[str, Any]:
    """Write the report's files; returns the figures in it.

    Args:
        plan: whose runs are shown, as far as they are finished.
        folder: where to; by default the ablation's.
    """
    folder = folder or plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    results = collect(plan)
    report.write_json(folder / "results.json", results)
    report.write_atomically(folder / "results.csv", results_csv(results))
    report.write_atomically(folder / "report.md", markdown(results))
    report.write_atomically(folder / "report.html", page(results))
    return results

"""Writing the report of an ablation, or of any set of run folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....errors import ConfigError
from ... import run_folder as report
from ..plan import PLAN, Plan, load_plan
from .collect import collect
from .figures import draw
from .folders import plan_of
from .html import page
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
    report.write_atomically(folder / "report.md", markdown(results, draw(results, folder)))
    report.write_atomically(folder / "report.html", page(results))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m mixerzoo.training.ablation.report RUNS...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mixerzoo.training.ablation.report",
        description="Write report.html, report.md, results.csv and plots of an ablation or of any finished runs.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folder of an ablation, of runs, or that holds runs")
    parser.add_argument("--out", type=Path, help="where to; by default the ablation's folder, else ./report")
    parser.add_argument("--reference", help="arm to compare with, for runs without an ablation; by default the first")
    parser.add_argument("--title", default="", help="of the report, for runs without an ablation")
    given = parser.parse_args(arguments)
    planned = [folder for folder in given.runs if (folder / PLAN).is_file()]
    try:
        if planned and len(planned) < len(given.runs):
            raise ConfigError("ablations and single runs cannot be mixed; give either.")
        if planned:
            if given.reference or given.title:
                raise ConfigError("--reference, --title: an ablation has its own.")
            for folder in planned:
                out = given.out if len(planned) == 1 or given.out is None else given.out / folder.name
                results = build_report(load_plan(folder), out)
                print(f"{(out or folder) / 'report.html'}: {len(results['cells'])} arms")
            return 0
        out = given.out or Path("report")
        results = build_report(plan_of(given.runs, reference=given.reference, title=given.title, out=out))
        print(f"{out / 'report.html'}: {len(results['cells'])} arms")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

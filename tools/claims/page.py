"""Results of claims, kept and put into docs/claims.md.

    python -m mixerzoo.tools.claims runs/ablation-NAME-HASH ...    keep what the verdicts rest on, and write the page
    python -m mixerzoo.tools.claims                                write the page anew

`docs/results/claims/NAME.json` holds the scores of every run and the costs of every arm, no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...training.ablation.claims import judge, overall, parse
from ...training.ablation.preset import from_command_line, list_ablations
from ...training.ablation.report.text import si, verdict_text
from ..markdown import replaced

ROOT = Path(__file__).resolve().parent.parent.parent
STORE = ROOT / "docs" / "results" / "claims"
PAGE = ROOT / "docs" / "claims.md"


def keep(folder: Path) -> Path:
    """Store what the verdicts of an ablation's folder rest on; returns the file."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    name = results["name"]
    runs = [run["seconds"] for cell in results["cells"] for run in cell["runs"]]
    kept = {
        "name": name,
        "metric": results["metric"],
        "higher_is_better": results["higher_is_better"],
        "environment": results["environment"],
        "code": results["code"],
        "seconds": sum(runs),
        "cells": [
            {
                "arm": cell["arm"],
                "label": cell["label"],
                "point": cell["point"],
                "runs": [{"seed": run["seed"], "value": run["value"]} for run in cell["runs"]],
                "costs": cell["costs"],
            }
            for cell in results["cells"]
        ],
        "scaling": results["scaling"],
    }
    STORE.mkdir(parents=True, exist_ok=True)
    path = STORE / f"{name}.json"
    path.write_text(json.dumps(_finite(kept), indent=1) + "\n", encoding="utf-8")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stored() -> dict[str, dict[str, Any]]:
    """The kept results by the name of the claim."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(STORE.glob("*.json"))}


def verdicts(name: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict on every line of a claim, from kept results."""
    lines = from_command_line([f"claim={name}"]).expect
    return [asdict(judge(parse(line, key=f"expect[{i}]"), results)) for i, line in enumerate(lines)]


def table() -> str:
    """All claims with their verdicts, as Markdown."""
    known = stored()
    lines = ["| claim | verdict | what was expected, and what came out |", "|---|---|---|"]
    for name in list_ablations("claim"):
        claim = from_command_line([f"claim={name}"]).claim
        paper = f"[{claim.paper}](https://arxiv.org/abs/{claim.arxiv})" if claim.arxiv else claim.paper
        said = f"**`{name}`** {paper}: {' '.join(claim.says.split())} Published: {claim.published}."
        if name not in known:
            lines.append(f"| {said} | not run yet | |")
            continue
        found = verdicts(name, known[name])
        rows = "<br>".join(f"`{v['text']}`: {v['verdict']}. {verdict_text(v)}" for v in found)
        took = f"<br>Training took {si(known[name]['seconds'] / 60)} minutes." if known[name]["seconds"] else ""
        lines.append(f"| {said} | **{overall([v['verdict'] for v in found])}** | {rows}{took} |")
    return "\n".join(lines)


def render(text: str) -> str:
    """The page with its table written anew."""
    return replaced(text, "claims", table())


def main(folders: Sequence[str]) -> None:
    """Keep the folders' results and write the page."""
    for folder in folders:
        print(keep(Path(folder)))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

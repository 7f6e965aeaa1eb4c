"""The report as one HTML file that opens offline: the figures as JSON, and what draws them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...run_folder import plain
from ..claims import overall
from .text import fairness, verdict_text, where

_ASSETS = Path(__file__).parent / "assets"
# Nothing may be loaded from anywhere, whatever the figures contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def _claim(results: Mapping[str, Any]) -> list[str]:
    """The claim and its verdicts, a line each."""
    claim, verdicts = results.get("claim"), results.get("verdicts") or []
    lines = [f"{v['text']}: {v['verdict']}. {verdict_text(v)}" for v in verdicts]
    if claim:
        verdict = overall([v["verdict"] for v in verdicts])
        lines = [f"{claim['paper']}: {claim['says']}", f"Verdict: {verdict}.", *lines]
    return lines


def page(results: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        results: of `collect`.
    """
    data = json.dumps(plain(results)).replace("<", "\\u003c")  # nothing in it can end the script
    title, description = html.escape(results["title"]), html.escape(" ".join(results["description"].split()))
    fair = "".join(f"<p>{html.escape(line)}</p>" for line in fairness(results))
    claim = "".join(f"<p>{html.escape(line)}</p>" for line in _claim(results))
    claim = f'<section id="claim"><h2>What was expected</h2>{claim}</section>' if claim else ""
    notes = "".join(f"<li>{html.escape(warning)}</li>" for warning in results["warnings"])
    warn = f'<section class="warn" id="notes"><h2>To keep in mind</h2><ul>{notes}</ul></section>' if notes else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{(_ASSETS / "report.css").read_text()}</style>
</head>
<body>
<main>
<header>
<div><h1>{title}</h1><p class="soft">{description}</p></div>
<button id="theme" type="button" aria-label="light or dark">Theme</button>
</header>
<noscript><p>The table and the plots need JavaScript; report.md beside this file holds the same figures.</p></noscript>
<div id="points" class="row"></div>
<div id="tiles" class="tiles"></div>
<div id="body"></div>
{claim}
{warn}
<section id="fairness"><h2>How the comparison was made fair</h2>{fair}</section>
<footer>{html.escape(where(results))}</footer>
</main>
<script type="application/json" id="results">{data}</script>
<script>
{(_ASSETS / "report.js").read_text()}</script>
</body>
</html>
"""

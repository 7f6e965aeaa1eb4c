"""The report as one HTML file that opens offline: the figures as JSON, and what draws them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...run_folder import plain
from .text import fairness, where

_ASSETS = Path(__file__).parent / "assets"
# Nothing may be loaded from anywhere, whatever the figures contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(results: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        results: of `collect`.
    """
    data = json.dumps(plain(results)).replace("<", "\\u003c")  # nothing in it can end the script
    title, description = html.escape(results["title"]), html.escape(" ".join(results["description"].split()))
    fair = "".join(f"<p>{html.escape(line)}</p>" for line in fairness(results))
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

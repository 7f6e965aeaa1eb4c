"""The section of a page that says where its subject stands."""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import table
from .standings import Standing


def standings_section(found: Sequence[Standing]) -> str:
    """A table of every arm of every stored comparison, or a sentence where there is none."""
    if not found:
        return "It is in none of them."
    rows = []
    for one in found:
        place = (
            "reference"
            if one.rank is None and one.reference
            else f"{one.rank}&nbsp;of&nbsp;{one.arms}"
            if one.rank
            else "-"
        )
        report = f"[{one.title}](../results/{one.study}/report.html)"
        arm = f"`{one.arm}`" + (" (reference)" if one.reference else "")
        rows.append((report, arm, one.point or "-", place, one.score or "-", one.cost))
    text = "Each of them holds backbone, data and recipe equal; its report says what it can tell and what it cannot."
    return f"{text}\n\n" + table(("Comparison", "Arm", "At", "Rank", "Score", "Cost"), rows)

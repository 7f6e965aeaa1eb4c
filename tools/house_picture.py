"""`docs/house.md` and its picture: which room imports which. `python -m mixerzoo.tools.house_picture` draws it.

Rooms are the folders two levels deep; an arrow is an import at the top of a file or inside of a function. They all
point down: `tests/test_house.py` fails otherwise.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
FLOORS: tuple[str, ...] = ("kernels", "mixers", "models", "tasks", "training", "contract")  # from the ground up
COLOURS: dict[str, str] = dict(
    zip(FLOORS, ("#7a5a46", "#1a8f6a", "#1f63c4", "#a67c00", "#b03a75", "#7a5bd0"), strict=True)
)
PICTURE = ROOT / "docs" / "house.png"


def room_of(parts: tuple[str, ...]) -> str:
    """`mixers/attention` for a module in it; ops are one room, `kernels/OP`; files of a floor itself are its hall."""
    if len(parts) < 3:
        return next(iter(parts))
    if parts[0] == "kernels" and parts[1] not in ("common", "cpu", "selftest"):
        return "kernels/OP"
    return "/".join(parts[:2])


def arrows() -> Counter[tuple[str, str]]:
    """(importing room, imported room) -> how many imports."""
    found: Counter[tuple[str, str]] = Counter()
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            here = path.relative_to(ROOT).parts
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ImportFrom) or not node.level:
                    continue
                base = (*here[: len(here) - node.level], *(node.module or "").split("."))
                target = tuple(part for part in base if part)
                if not target or target[0] not in FLOORS:
                    continue
                inside = (ROOT.joinpath(*target)).is_dir()
                room = room_of((*target, "x") if inside else target)
                if room != room_of(here):
                    found[room_of(here), room] += 1
    return found


def draw(path: Path = PICTURE) -> None:
    """Write the picture: a row of rooms for each floor, the ground floor at the bottom."""
    edges = arrows()
    rooms = sorted({room for edge in edges for room in edge} | set(FLOORS))
    place: dict[str, tuple[float, float]] = {}
    for y, floor in enumerate(FLOORS):
        row = [room for room in rooms if room.split("/")[0] == floor]
        for i, room in enumerate(row):
            place[room] = ((i + 1) / (len(row) + 1), float(y))
    figure = Figure(figsize=(13, 8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (above, below), count in edges.items():
        bend = "arc3,rad=0.25" if place[above][1] == place[below][1] else "arc3,rad=0.04"
        style = {
            "arrowstyle": "->",
            "lw": 0.5 + min(count, 12) / 8,
            "color": COLOURS[above.split("/")[0]],
            "alpha": 0.5,
        }
        axes.annotate("", place[below], place[above], arrowprops={**style, "connectionstyle": bend, "shrinkB": 12})
    for room, (x, y) in place.items():
        box = {
            "boxstyle": "round,pad=0.35",
            "fc": "#ffffff" if "/" in room else "#f0f0f0",
            "ec": COLOURS[room.split("/")[0]],
        }
        axes.text(
            x, y, room.rpartition("/")[2] if "/" in room else room, ha="center", va="center", fontsize=9, bbox=box
        )
    axes.set(xlim=(0, 1), ylim=(-0.5, len(FLOORS) - 0.5))
    axes.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    draw()

"""The report's plots as PNG files, for pages that take no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .statistics import pareto

_COLOURS = [
    "#1f63c4",
    "#d9622b",
    "#1a8f6a",
    "#b03a75",
    "#7a5bd0",
    "#a67c00",
    "#1592b8",
    "#c23b3b",
    "#5d7f1e",
    "#7a5a46",
]
_DASHES = ("-", "--", ":")
_MARKERS = ("o", "s", "^")
_COSTS = (
    ("flops", "FLOPs per sample", False),
    ("activation_bytes", "activation bytes per sample", False),
    ("train_throughput", "training, {unit}/s", True),
)


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw what there is to draw into a folder; returns the names of the files.

    Args:
        results: of `collect`.
        folder: exists.
    """
    done = []
    if results["trains"] and any(cell["runs"] for cell in results["cells"]):
        done += [_pareto(results, folder / "pareto.png"), _curves(results, folder / "curves.png")]
        done += [_varied(results, folder / "points.png")]
    if results["scaling"]:
        done += [_scaling(results, folder / "scaling.png")]
    return [name for name in done if name]


def _figure(columns: int, rows: int = 1, *, width: float = 5.0, height: float = 3.6) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for one in axes:
        one.grid(alpha=0.25, linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(results: Mapping[str, Any], arm: str) -> dict[str, Any]:
    arms = list(dict.fromkeys(cell["arm"] for cell in results["cells"]))
    i = arms.index(arm)
    return {"color": _COLOURS[i % 10], "linestyle": _DASHES[i // 10 % 3], "marker": _MARKERS[i // 10 % 3]}


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        inches = 0.6 + 0.075 * max(map(len, labels))  # of an entry at this size
        columns = max(1, min(8, int(figure.get_figwidth() / inches)))
        figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _points(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for cell in results["cells"]:
        if cell["point"] not in found:
            found.append(cell["point"])
    return found


def _name(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())


def _value(cost: Any) -> float:
    value = cost["median"] if isinstance(cost, Mapping) else cost
    return float(value) if isinstance(value, (int, float)) else math.nan


def _pareto(results: Mapping[str, Any], path: Path) -> str:
    """Quality against each cost at the last point, with the Pareto front."""
    point = _points(results)[-1]
    cells = [c for c in results["cells"] if c["point"] == point and math.isfinite(c["mean"])]
    costs = [c for c in _COSTS if sum(math.isfinite(_value(cell["costs"].get(c[0]))) for cell in cells) > 1]
    if not costs or not cells:
        return ""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = _figure(len(costs))
    sign = 1 if results["higher_is_better"] else -1
    for one, (key, name, more) in zip(axes, costs, strict=True):
        x = [_value(cell["costs"].get(key)) for cell in cells]
        for cell, cost in zip(cells, x, strict=True):
            style = {**_style(results, cell["arm"]), "linestyle": "none", "label": cell["arm"]}
            bar = [[max(0.0, cell["mean"] - cell["low"])], [max(0.0, cell["high"] - cell["mean"])]]
            one.errorbar(cost, cell["mean"], bar, markersize=5, elinewidth=1, **style)
        front = pareto([-v if more else v for v in x], [sign * cell["mean"] for cell in cells])
        one.plot([x[i] for i in front], [cells[i]["mean"] for i in front], ":", color="#5b6675", linewidth=1)
        known = [v for v in x if v > 0]
        if known and max(known) > 3 * min(known):
            one.set_xscale("log")
            one.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            one.xaxis.set_minor_formatter(EngFormatter(sep="") if max(known) < 10 * min(known) else NullFormatter())
        one.xaxis.set_major_formatter(EngFormatter(sep=""))
        one.set(xlabel=name.format(unit=results["unit"]), ylabel=f"{results['split']} {results['metric']}")
    _legend(figure, axes[0])
    figure.suptitle(results["title"] + (f" ({_name(point)})" if point else ""), fontsize=10)
    figure.savefig(path)
    return path.name


def _curves(results: Mapping[str, Any], path: Path) -> str:
    """The validation score over the steps, where it was taken more than once."""
    points = _points(results)[-3:]
    if all(len(cell["curve"]) < 2 for cell in results["cells"] if cell["point"] in points):
        path.unlink(missing_ok=True)
        return ""
    figure, axes = _figure(len(points), width=max(5.0, 8.0 / len(points)))
    for one, point in zip(axes, points, strict=True):
        for cell in results["cells"]:
            if cell["point"] != point or not cell["curve"]:
                continue
            style = {**_style(results, cell["arm"]), "markersize": 3}
            steps = [line["step"] for line in cell["curve"]]
            one.plot(steps, [line["mean"] for line in cell["curve"]], label=cell["arm"], linewidth=1.4, **style)
            low, high = ([line[key] for line in cell["curve"]] for key in ("low", "high"))
            one.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
        one.set(xlabel="step", ylabel=f"validation {results['metric']}", title=_name(point))
        one.title.set_fontsize(9)
    _legend(figure, axes[0])
    figure.savefig(path)
    return path.name


def _varied(results: Mapping[str, Any], path: Path) -> str:
    """The score over each setting with several numbers, at the last of the other values."""
    keys = [
        key
        for key, values in results["vary"].items()
        if len(values) > 1 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    ]
    if not keys:
        return ""
    figure, axes = _figure(len(keys), width=6.0, height=4.2)
    last = _points(results)[-1]
    for one, key in zip(axes, keys, strict=True):
        for arm in dict.fromkeys(cell["arm"] for cell in results["cells"]):
            cells = [
                c
                for c in results["cells"]
                if c["arm"] == arm
                and math.isfinite(c["mean"])
                and all(c["point"][other] == last[other] for other in last if other != key)
            ]
            if not cells:
                continue
            style = _style(results, arm)
            x = [c["point"][key] for c in cells]
            one.plot(x, [c["mean"] for c in cells], markersize=3.5, label=arm, linewidth=1.4, **style)
            one.fill_between(x, [c["low"] for c in cells], [c["high"] for c in cells], color=style["color"], alpha=0.12)
        one.set(xlabel=key, ylabel=f"{results['split']} {results['metric']}", xticks=results["vary"][key])
    _legend(figure, axes[0])
    figure.savefig(path)
    return path.name


def _scaling(results: Mapping[str, Any], path: Path) -> str:
    arm_of = {cell["label"]: cell["arm"] for cell in results["cells"]}
    titles = {
        "train_seconds": "training step, seconds",
        "infer_seconds": "forward pass, seconds",
        "activation_bytes": "activations kept for backward, bytes",
        "peak_bytes": "peak memory added by a training step, bytes",
    }
    figure, axes = _figure(2, 2)
    lengths: Sequence[int] = results["scaling"]["lengths"]
    for one, (key, title) in zip(axes, titles.items(), strict=True):
        for label, lines in results["scaling"]["arms"].items():
            pairs = [(line["length"], v) for line in lines if (v := _value(line[key])) > 0]
            if pairs:
                style = _style(results, arm_of[label])
                one.plot(*zip(*pairs, strict=True), markersize=3, label=arm_of[label], **style)
        one.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        one.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        one.minorticks_off()
        one.title.set_fontsize(9)
    _legend(figure, axes[0])
    figure.savefig(path)
    return path.name

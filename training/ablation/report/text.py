"""The report as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..claims import overall


def si(value: float | None, digits: int = 3) -> str:
    """A number with k, M, G, T: 122674 as 123k."""
    if value is None or not math.isfinite(value):
        return ""
    for power, sign in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.{digits}g}{sign}"
    return f"{value:.{digits}g}"


def score(value: float | None) -> str:
    """A score to four places."""
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _sorted(results: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    sign = -1 if results["higher_is_better"] else 1
    return sorted(cells, key=lambda c: sign * c["mean"] if math.isfinite(c["mean"]) else math.inf)


def p_text(difference: Mapping[str, Any] | None) -> str:
    """An adjusted p-value, for people."""
    if difference is None or not math.isfinite(difference["p_holm"]):
        return ""
    return "<0.001" if difference["p_holm"] < 0.001 else f"{difference['p_holm']:.3f}"


def fairness(results: Mapping[str, Any]) -> list[str]:
    """How the comparison was made fair, in sentences."""
    if results["given"]:
        return [
            "The runs were given as they are: nothing was matched, and it was not checked that they share data and "
            "recipe. Of runs that differ only in the learning rate the best on validation counts. Intervals are 95%, "
            "bootstrap over seeds; p is of a paired t-test against the reference, adjusted (Holm)."
        ]
    what = {"parameters": "Parameters", "flops": "FLOPs of one sample"}.get(results["match"])
    lines = []
    if what:
        lines.append(
            f"{what} are matched to those of {results['reference']} within {results['tolerance']:.0%} by the model's "
            "width, and by the channel mixers' ratio where widths are too coarse."
        )
    else:
        lines.append("Sizes are not matched: all arms have the widths of the base model.")
    if results["trains"]:
        rates = ", ".join(f"{rate:g}" for rate in results["rates"])
        chosen = (
            f"the best of the learning rates {rates} for each arm, chosen on validation with the first "
            f"{results['lr_seeds']} seed(s)"
            if len(results["rates"]) > 1
            else f"the learning rate {rates}"
        )
        lines.append(f"All arms share backbone, data, data order of each seed, and recipe, with {chosen}.")
        lines.append(
            f"Values are on the {results['split']} split, mean over the seeds "
            f"{', '.join(map(str, results['seeds']))}, which only runs at the chosen rate enter; "
            "intervals are 95%, bootstrap over seeds; p is of a paired t-test against the reference, adjusted (Holm)."
        )
    return lines


def markdown(results: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report as Markdown.

    Args:
        results: of `collect`.
        pictures: files beside it.
    """
    lines = [f"# {results['title']}", ""]
    if results["description"]:
        lines += [" ".join(results["description"].split()), ""]
    lines += [*claim_lines(results)]
    lines += [*fairness(results), ""]
    points = []
    for cell in results["cells"]:
        if cell["point"] not in points:
            points.append(cell["point"])
    if len(points) > 1 and results["trains"]:
        lines += _pivot(results, points)
    for point in points:
        cells = [cell for cell in results["cells"] if cell["point"] == point]
        if point:
            lines += ["## " + ", ".join(f"{key} = {value}" for key, value in point.items()), ""]
        lines += _table(results, _sorted(results, cells))
    lines += _growth(results)
    if results["warnings"]:
        lines += ["## To keep in mind", "", *(f"- {warning}" for warning in results["warnings"]), ""]
    if pictures:
        lines += ["## Pictures", "", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures), ""]
    lines += ["## Commands", "", "Each repeats the first run of an arm:", ""]
    lines += [f"    {cell['command']}" for cell in results["cells"]]
    lines += ["", where(results)]
    return "\n".join(lines) + "\n"


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """A verdict in a sentence."""
    gap = (
        ""
        if verdict["left"] is None or not math.isfinite(verdict["left"])
        else (f"{si(verdict['left'], 4)} against {si(verdict['right'], 4)}")
    )
    if gap and verdict["seeds"] > 1:
        gap += f"; the difference is {verdict['low']:+.4g} to {verdict['high']:+.4g} (95%, {verdict['seeds']} seeds)"
    return ". ".join(part for part in (gap, verdict["why"]) if part)


def claim_lines(results: Mapping[str, Any]) -> list[str]:
    """The claim that is put to the test and the verdict on each line, as Markdown; empty without one."""
    claim, verdicts = results.get("claim"), results.get("verdicts") or []
    if not claim and not verdicts:
        return []
    lines = ["## The claim" if claim else "## What was expected", ""]
    if claim:
        number = f" (arXiv:{claim['arxiv']})" if claim["arxiv"] else ""
        lines += [f"{claim['paper']}{number}: {claim['says']}"]
        lines += [f"Published: {claim['published']}", ""] if claim["published"] else [""]
        lines += [f"Verdict: **{overall([v['verdict'] for v in verdicts])}**.", ""]
    lines += ["| expected | verdict | measured |", "|---|---|---|"]
    lines += [f"| `{v['text']}` | {v['verdict']} | {verdict_text(v)} |" for v in verdicts]
    return [*lines, ""]


def _growth(results: Mapping[str, Any]) -> list[str]:
    """Seconds of a training step and activations over the lengths."""
    if not results["scaling"]:
        return []
    lengths = results["scaling"]["lengths"]
    exponents = {cell["label"]: cell["costs"] for cell in results["cells"]}
    done = []
    for title, key, power in (
        ("Seconds of a training step", "train_seconds", "time_exponent"),
        ("Seconds of a forward pass", "infer_seconds", "inference_exponent"),
        ("Bytes kept for the backward pass", "activation_bytes", "memory_exponent"),
        ("Peak memory added by a training step, bytes", "peak_bytes", ""),
    ):
        done += [f"## {title}, by tokens", ""]
        heads = ["arm", *(f"{n:,}" for n in lengths), *(["grows as N^"] if power else [])]
        done += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for label, rows in results["scaling"]["arms"].items():
            known = {row["length"]: row[key] for row in rows}
            values = [known.get(n) for n in lengths]
            texts = [si(v["median"] if isinstance(v, Mapping) else v) for v in values]
            last = [f"{exponents[label][power]:.2f}"] if power else []
            done.append("| " + " | ".join([f"`{label}`", *texts, *last]) + " |")
        done.append("")
    done += [f"- `{label}`: {why}." for label, why in results["scaling"]["stopped"].items()]
    return [*done, ""]


def _pivot(results: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arms against points."""
    names = [", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()) for point in points]
    lines = [f"| {results['metric']} | " + " | ".join(names) + " |", "|---" * (len(points) + 1) + "|"]
    for arm in dict.fromkeys(cell["arm"] for cell in results["cells"]):
        found = [next(c for c in results["cells"] if c["arm"] == arm and c["point"] == point) for point in points]
        texts = [f"{score(c['mean'])} ± {score(c['sd'])}" if c["runs"] else c["status"] for c in found]
        lines.append(f"| `{arm}` | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _table(results: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    reference = results["reference"]
    head = ["arm", "parameters", "FLOPs", "activations"]
    if results["trains"]:
        head[1:1] = [f"{results['split']} {results['metric']}", "95% interval", f"against {reference}", "p", "lr"]
    measured = [key for key in MEASURED if any(key in cell["costs"] for cell in cells)]
    head += [MEASURED[key][0].format(unit=results["unit"]) for key in measured]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in cells:
        mark = (
            " (reference)" if cell["arm"] == reference else " (control)" if cell["arm"] in results["controls"] else ""
        )
        costs = cell["costs"]
        row = [
            f"`{cell['arm']}`{mark}",
            f"{costs['parameters']:,}" if "parameters" in costs else "",
            si(costs.get("flops")),
            _bytes(costs.get("activation_bytes")),
        ]
        if results["trains"]:
            row[1:1] = scores(cell)
        row += [_spread(costs.get(key), MEASURED[key][1]) for key in measured]
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, ""]


def scores(cell: Mapping[str, Any]) -> list[str]:
    """Mean with deviation, interval, distance to the reference, p, and learning rate, as text."""
    if not cell["runs"]:
        return [cell["status"], "", "", "", ""]
    gap = cell["difference"]
    return [
        f"{score(cell['mean'])} ± {score(cell['sd'])}" if len(cell["runs"]) > 1 else score(cell["mean"]),
        f"{score(cell['low'])} to {score(cell['high'])}" if len(cell["runs"]) > 1 else "",
        f"{gap['mean']:+.4f}" if gap and math.isfinite(gap["mean"]) else "",
        p_text(gap),
        f"{cell['lr']:g}",
    ]


def _bytes(value: float | None) -> str:
    return f"{si(value)}B" if value is not None and math.isfinite(value) else ""


# measured figures: heading, kind
MEASURED: dict[str, tuple[str, str]] = {
    "train_throughput": ("training, {unit}/s", "rate"),
    "infer_throughput": ("inference, {unit}/s", "rate"),
    "observed_throughput": ("while it trained, {unit}/s", "rate"),
    "peak_bytes": ("peak memory", "bytes"),
    "state_bytes": ("state", "bytes"),
    "decode_seconds": ("decoding, s/token", "seconds"),
    "time_exponent": ("time grows as N^", "plain"),
    "memory_exponent": ("memory grows as N^", "plain"),
}


def _spread(value: Any, kind: str) -> str:
    if isinstance(value, Mapping):
        low, high = sorted((value["p25"], value["p75"]))
        return f"{si(value['median'])} ({si(low)} to {si(high)})"
    if value is None:
        return ""
    return _bytes(value) if kind == "bytes" else f"{value:.2f}" if kind == "plain" else si(value)


def where(results: Mapping[str, Any]) -> str:
    """On what and from which code the figures were made, in a sentence."""
    environment = results["environment"]
    gpus = ", ".join(environment["gpus"]) or "no GPU"
    code = f"code {results['code'][:12]}" + (f", commit {results['git'][:12]}" if results["git"] else "")
    data = f"; data {results['data']['sha256'][:12]}" if results["data"] else ""
    return (
        f"PyTorch {environment['torch']} on {environment['threads']} thread(s) of {environment['cpu']}, {gpus}; "
        f"{code}{data}."
    )


def results_csv(results: Mapping[str, Any]) -> str:
    """One row per arm and point, all figures unrounded."""
    rows = []
    for cell in results["cells"]:
        gap, match = cell["difference"] or {}, cell["matched"] or {}
        row: dict[str, Any] = {
            "arm": cell["arm"],
            **cell["point"],
            "status": cell["status"],
            "metric": results["metric"],
        }
        row |= {"mean": cell["mean"], "sd": cell["sd"], "low": cell["low"], "high": cell["high"]}
        row |= {"seeds": len(cell["runs"]), "lr": cell["lr"]}
        row |= {"difference": gap.get("mean"), "p": gap.get("p"), "p_holm": gap.get("p_holm")}
        row |= {"matched_within": match.get("within"), "match_difference": match.get("difference")}
        for key, value in cell["costs"].items():
            if isinstance(value, Mapping):
                row |= {f"{key}_{part}": value[part] for part in ("median", "p25", "p75")}
            elif not isinstance(value, list):
                row[key] = value
        row["values"] = " ".join(repr(run["value"]) for run in cell["runs"])
        row["command"] = cell["command"]
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [c for c in columns if c != "command"] + ["command"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if _empty(value) else value for key, value in row.items()})
    return out.getvalue()


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))

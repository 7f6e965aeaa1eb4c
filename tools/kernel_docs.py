"""Write the tables of `docs/kernels.md`: `python -m mixerzoo.tools.kernel_docs [--roofline | --prediction]`.

The traffic table is measured anew in Triton's interpreter (about two minutes); `--roofline` rewrites only the table of
costs, which is arithmetic, `--prediction` only what `tools.predict` says (minutes). All of them write
`kernels/__init__.pyi`, the public names of all ops for type checkers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..kernels.common import public
from ..kernels.common.costs import GPUS
from ..kernels.common.discovery import find_cases, find_rooflines
from .markdown import replaced
from .predict import prediction_table
from .traffic import DOCUMENT, measure, run_interpreted

STUB = Path(public.__file__).parents[1] / "__init__.pyi"


def traffic_table() -> str:
    """Every case: launches, bytes, and ratios to what must be."""
    lines = ["| case | launches | bytes | by compulsory bytes | matmul flops by minimal |", "|---|---|---|---|---|"]
    return "\n".join(lines + [measure(name, case).row() for name, case in find_cases().items()])


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def roofline_table() -> str:
    """Every op at model size: compulsory bytes, flops, intensity, and the floor on each GPU."""
    floors = " | ".join(f"floor on {gpu}" for gpu in GPUS)
    lines = [
        f"| op | size | MB | matmul Gflop | other Gflop | G exponentials | flops per byte | {floors} |",
        "|---|---|---|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for c in find_rooflines():
        bounds = " | ".join(f"{_time(seconds)} ({what})" for seconds, what in (c.floor(gpu) for gpu in GPUS))
        lines.append(
            f"| {c.label} | {c.size} | {c.bytes / 1e6:.1f} | {c.matmul / 1e9:.2f} | {c.other / 1e9:.2f} | "
            f"{c.exponentials / 1e9:.2f} | {c.intensity:.1f} | {bounds} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.tools.kernel_docs", description="Rewrite kernels.md.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--roofline", action="store_true", help="only the table of costs")
    only.add_argument("--prediction", action="store_true", help="only the table of predicted times")
    parser.add_argument("--quick", action="store_true", help="predict no times, which takes Triton's interpreter long")
    options = parser.parse_args(arguments)
    text = DOCUMENT.read_text()
    if options.prediction:
        text = replaced(text, "prediction", prediction_table(quick=options.quick))
    else:
        text = replaced(text, "roofline", roofline_table())
    if not options.roofline and not options.prediction:
        text = replaced(text, "traffic", traffic_table())
    DOCUMENT.write_text(text)
    STUB.write_text(public.stub())
    return 0


if __name__ == "__main__":
    run_interpreted("mixerzoo.tools.kernel_docs")
    sys.exit(main())

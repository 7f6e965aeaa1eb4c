"""Count what the Triton kernels read, write and multiply, in Triton's interpreter.

    python -m mixerzoo.tools.traffic [--only OP or OP.CASE ...] [--json] [--check]

Runs the cases of `kernels/<op>/cases.py`. Counted are the bytes that the programs ask for, each time they do and before
any cache, save masked-out elements, and the flops of `tl.dot`. They stand against the compulsory bytes that the case
states (each input, output and gradient once) and its minimal matmul flops. An autotuned kernel runs with its first
config.
`--check` compares with the figures in `docs/kernels.md` and exits with 1 when one has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..kernels.common.discovery import Call, find_cases

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
SLACK = 1.002  # of the documented ratios, which are rounded to three digits


@dataclass
class Traffic:
    """What a case moved.

    Attributes:
        case: its name.
        kernels: by kernel, a count of launches, programs, read and written bytes, atomic bytes and (matmul) flops.
        compulsory: bytes that must move.
        minimal: matmul flops that must be done; 0 where there are none.
    """

    case: str
    kernels: dict[str, Counter[str]] = field(default_factory=dict)
    compulsory: int = 0
    minimal: int = 0

    def total(self, key: str) -> int:
        """Sum over the kernels."""
        return sum(c[key] for c in self.kernels.values())

    @property
    def moved(self) -> int:
        """Bytes read and written; an atomic update does both."""
        return self.total("read") + self.total("written") + 2 * self.total("atomic")

    @property
    def ratio(self) -> float:
        """Bytes moved, by compulsory bytes."""
        return self.moved / self.compulsory

    @property
    def flops_ratio(self) -> float | None:
        """Matmul flops, by minimal ones."""
        return self.total("flops") / self.minimal if self.minimal else None

    def table(self) -> str:
        """The kernels, a line each, and the sum."""
        lines = [f"== {self.case}"]
        for name, c in self.kernels.items():
            lines.append(
                f"   {name[:40]:40} launches {c['launches']:3}  programs {c['programs']:5}  read {c['read']:11,}  "
                f"written {c['written']:11,}  atomic {c['atomic']:9,}  matmul flops {c['flops']:13,}"
            )
        flops = f", flops ratio {self.flops_ratio:.2f}" if self.flops_ratio is not None else ""
        lines.append(
            f"   {self.total('launches')} launches, {self.moved:,} bytes of {self.compulsory:,} compulsory, "
            f"traffic ratio {self.ratio:.3f}{flops}"
        )
        return "\n".join(lines)

    def row(self) -> str:
        """A line of the table in the documentation."""
        flops = f"{self.flops_ratio:.2f}" if self.flops_ratio is not None else "-"
        return f"| {self.case} | {self.total('launches')} | {self.moved:,} | {self.ratio:.3f} | {flops} |"


@contextmanager
def counting() -> Iterator[dict[str, Counter[str]]]:
    """Meanwhile, interpreted kernels are counted, by the name of the kernel."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    counts: dict[str, Counter[str]] = {}
    running: list[str] = []
    saved: list[tuple[type, str, Any]] = []

    def count(key: str, number: int) -> None:
        if running:
            counts.setdefault(running[-1], Counter())[key] += number

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def before(owner: type, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(self, *args)
            return original(self, *args, **kwargs)

        saved.append((owner, name, original))
        setattr(owner, name, wrapped)

    def matmul(_: Any, a: Any, b: Any, *__: Any) -> None:
        count("flops", 2 * a.data.size * b.data.shape[-1])  # (..., M, K) (..., K, N)

    before(builder, "create_masked_load", lambda self, ptrs, mask, *_: count("read", size(ptrs, mask)))
    before(builder, "create_masked_store", lambda self, ptrs, value, mask, *_: count("written", size(ptrs, mask)))
    before(builder, "create_atomic_rmw", lambda self, op, ptrs, value, mask, *_: count("atomic", size(ptrs, mask)))
    before(builder, "create_dot", matmul)
    before(builder, "set_grid_idx", lambda *_: count("programs", 1))

    call = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(self.fn.__name__)
        count("launches", 1)
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    saved.append((executor, "__call__", call))
    executor.__call__ = launch
    try:
        yield counts
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def measure(name: str, case: Call) -> Traffic:
    """Run a case in the interpreter, which `TRITON_INTERPRET=1` must have turned on before kernels were imported.

    Raises:
        RuntimeError: when no kernel was interpreted.
    """
    with counting() as kernels:
        needs = case()
    if not kernels:
        raise RuntimeError(f"{name} launched no interpreted kernel; is TRITON_INTERPRET=1 set?")
    return Traffic(name, kernels, needs["bytes"], needs.get("flops", 0))


def documented(text: str | None = None) -> dict[str, tuple[int, float, float | None]]:
    """Launches, traffic ratio and flops ratio by case, from `docs/kernels.md`."""
    pattern = r"^\| (\w+\.\w+) \| (\d+) \| [\d,]+ \| ([\d.]+) \| ([\d.]+|-) \|$"
    found = re.findall(pattern, DOCUMENT.read_text() if text is None else text, re.MULTILINE)
    return {case: (int(n), float(ratio), None if flops == "-" else float(flops)) for case, n, ratio, flops in found}


def growth(traffic: Traffic, figures: dict[str, tuple[int, float, float | None]]) -> list[str]:
    """How a measurement exceeds the documented figures."""
    if traffic.case not in figures:
        return [f"{traffic.case}: not in docs/kernels.md; run python -m mixerzoo.tools.kernel_docs"]
    launches, ratio, flops = figures[traffic.case]
    found = []
    if traffic.total("launches") > launches:
        found.append(f"{traffic.case}: {traffic.total('launches')} launches, documented {launches}")
    if traffic.ratio > max(ratio * SLACK, ratio + 0.0006):
        found.append(f"{traffic.case}: traffic ratio {traffic.ratio:.3f}, documented {ratio}")
    if flops is not None and traffic.flops_ratio is not None and traffic.flops_ratio > flops + 0.006:
        found.append(f"{traffic.case}: flops ratio {traffic.flops_ratio:.2f}, documented {flops}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.tools.traffic", description="Count bytes and flops.")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="ops or cases, e.g. ssd or ssd.forward")
    parser.add_argument("--json", action="store_true", help="one JSON object for each case instead of tables")
    parser.add_argument("--check", action="store_true", help="fail when a figure of docs/kernels.md has grown")
    options = parser.parse_args(arguments)
    try:
        cases = find_cases(options.only)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    figures = documented() if options.check else {}
    problems = []
    for name, case in cases.items():
        traffic = measure(name, case)
        print(json.dumps(asdict(traffic)) if options.json else traffic.table(), flush=True)
        problems += growth(traffic, figures) if options.check else []
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def run_interpreted(module: str) -> None:
    """Start over with `TRITON_INTERPRET=1`: triton reads it when it is imported, which torchvision does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode)


if __name__ == "__main__":
    run_interpreted("mixerzoo.tools.traffic")
    sys.exit(main())

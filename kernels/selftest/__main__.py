"""Test every kernel on the GPU of this machine: `python -m mixerzoo.kernels.selftest`.

    [--quick] [--large] [--op NAME ...] [--json FILE]

Every op and every decoding step is held against its definition in float64: outputs, the gradient of every input,
initial and final states, in float32, bfloat16 and float16, over sizes that fit no block, inputs that are contiguous in
no axis, masks and packed documents, with every autotune configuration, uninitialised memory filled with NaN, and twice
for equality of every bit. Kernels are compiled in parallel processes first, since one by one that is most of the time.
`--quick` takes one size in two dtypes; `--large` adds sequences of 131,072 tokens (against the eager path) and batches
of more than 2^31 numbers (their last row), as far as memory allows.

The outcome is kept by card, Triton and code of the kernels; `backend="auto"` runs what failed in PyTorch and warns
once. The exit status is 1 when anything failed, and 2 where there is no GPU. With `TRITON_INTERPRET=1` the kernels run
in Triton's interpreter on the CPU, which shows that the test works, not that a card does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from ...errors import ConfigError
from ..common.discovery import find_ops
from . import verdicts
from .check import Outcome
from .compiling import this_arch
from .running import compile_ahead, interpreted, run_elsewhere, run_here, tasks_of

AT_ONCE = 4  # ops on the GPU at a time


def failures(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """By op, what failed in a few words, "" for nothing."""
    found: dict[str, str] = {}
    for o in outcomes:
        found.setdefault(o.op, "")
        if not o.passed and not found[o.op]:
            found[o.op] = f"{o.dtype}: {o.problem or f'{o.where} is off by {o.error:.1e}, allowed {o.limit:.0e}'}"
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """The worst of each op and dtype, a line each, and every failure below."""
    lines = [f"{'op':24} {'dtype':10} {'checks':>6} {'worst error':>11} {'limit':>7}  verdict"]
    for op, dtype in dict.fromkeys((o.op, o.dtype) for o in outcomes):
        group = [o for o in outcomes if (o.op, o.dtype) == (op, dtype)]
        ran = [o for o in group if o.skipped is None]
        worst = max((o.error for o in ran), default=0.0)
        verdict = "ok" if all(o.passed for o in group) else "FAILED"
        verdict += f", {len(group) - len(ran)} skipped" if len(ran) < len(group) else ""
        lines.append(f"{op:24} {dtype:10} {len(ran):6} {worst:11.1e} {group[0].limit:7.0e}  {verdict}")
    for o in outcomes:
        if not o.passed:
            why = o.problem or f"{o.where}: {o.error:.1e}"
            lines.append(f"FAILED {o.op} {o.dtype} ({o.kind} sizes {o.place}): {why}")
        elif o.skipped:
            lines.append(f"skipped {o.op} {o.dtype} ({o.kind}): {o.skipped}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    import triton

    driver = "-"
    if torch.cuda.is_available():
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            driver = done.stdout.splitlines()[0].strip() if done.stdout else "-"
        except (OSError, subprocess.TimeoutExpired):  # ROCm, or no such tool: the name of the card will do
            pass
    return {
        "card": verdicts.card(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "code": verdicts.code(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mixerzoo.kernels.selftest", description="Test every kernel on this machine's GPU."
    )
    parser.add_argument("--quick", action="store_true", help="one size of each op, in two dtypes")
    parser.add_argument("--large", action="store_true", help="also 131,072 tokens and more than 2^31 numbers")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="only these, e.g. ssd or ssd_step")
    parser.add_argument("--json", metavar="FILE", help="write all outcomes there, a line each, as they come")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiling processes")
    parser.add_argument("--compile", action="store_true", help="only fill the cache, model sizes included")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        names = list(find_ops(options.op))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.child:
        for outcome in run_here(names[0], quick=options.quick, large=options.large):
            print(json.dumps(asdict(outcome)), flush=True)
        return 0
    on_gpu = torch.cuda.is_available() and not interpreted()
    if not on_gpu and not interpreted():
        print("There is no GPU; with TRITON_INTERPRET=1 the test runs in Triton's interpreter.", file=sys.stderr)
        return 2
    start = time.time()
    if options.json:
        open(options.json, "w").close()
    if on_gpu:
        tasks = tasks_of(names, quick=options.quick, models=options.compile)
        for failure in compile_ahead(tasks, this_arch(), options.jobs):
            print(f"not compiled: {failure}", flush=True)
        print(f"compiled {len(tasks)} calls in {time.time() - start:.0f} s", flush=True)
    if options.compile:
        return 0
    outcomes = list(_run_all(names, options, on_gpu=on_gpu))
    print(table(outcomes))
    print("; ".join(f"{key} {value}" for key, value in machine().items()) + f"; {time.time() - start:.0f} s")
    found = failures(outcomes)
    kept = verdicts.store(found)
    bad = [op for op, why in found.items() if why]
    if not bad:
        print(f"All {len(found)} ops passed ({kept}).")
        return 0
    print(
        f'{len(bad)} of {len(found)} ops failed: {", ".join(bad)}. backend="auto" will not take their kernels here '
        f"({kept}); elsewhere: {verdicts.AVOID}={','.join(bad)}"
    )
    return 1


def _run_all(names: Sequence[str], options: argparse.Namespace, *, on_gpu: bool) -> Iterator[Outcome]:
    """Outcomes as they come, op by op; on a GPU several ops at a time."""

    def one(name: str) -> list[Outcome]:
        run = run_elsewhere if on_gpu else run_here
        return list(run(name, quick=options.quick, large=options.large))

    # --large needs all of the memory, the interpreter all of the processor
    with ThreadPoolExecutor(AT_ONCE if on_gpu and not options.large else 1) as pool:
        for found in pool.map(one, names):
            if options.json:
                with open(options.json, "a") as file:
                    file.writelines(json.dumps({**asdict(o), "passed": o.passed}) + "\n" for o in found)
            bad = [o for o in found if not o.passed]
            print(f"{found[0].op}: {f'{len(bad)} of {len(found)} FAILED' if bad else f'{len(found)} ok'}", flush=True)
            yield from found


if __name__ == "__main__":
    sys.exit(main())

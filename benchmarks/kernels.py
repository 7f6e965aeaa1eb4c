"""Time every Triton kernel on a GPU, against its floor and its peers.

    python -m mixerzoo.benchmarks.kernels [--only OP ...] [--json FILE]

Each op runs at the size of a real model, forward, and forward with backward. Printed are the median time, the floor
(`kernels/common/costs.py`: what the compulsory bytes and flops take at the data sheet's rates) and the same for the
peers that are installed: flash-linear-attention, mamba_ssm and causal_conv1d, and PyTorch (our eager path, or the
library's function). Runs are interleaved, and the cache is flushed in between. Without a GPU it exits with 2.

The subjects are in `kernel_subjects.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mixerzoo.benchmarks.kernel_subjects import Subject, subjects
from mixerzoo.errors import ConfigError, unknown
from mixerzoo.kernels.common.costs import GPUS, Cost
from mixerzoo.kernels.common.discovery import find_rooflines
from torch import Tensor


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _step(function: Callable[..., Any], tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]
    first = _tensors(function(*leaves))
    cotangents = [torch.randn_like(y) for y in first]
    return lambda: torch.autograd.grad(_tensors(function(*leaves)), leaves, cotangents, allow_unused=True)


def _milliseconds(runs: dict[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """Median time of each on the GPU, by events, in rotating order, the second-level cache overwritten in between."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 3):  # three to warm up, in which Triton autotunes
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            runs[name]()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def cost_of(subject: Subject, backward: bool, costs: Sequence[Cost]) -> Cost | None:
    """The entry of `find_rooflines()` for a subject, if there is one."""
    labels = (f"{subject.op} with backward",) if backward else (f"{subject.op} forward", subject.op)
    return next((c for c in costs if c.label in labels and c.size.startswith(subject.size)), None)


def measure(subject: Subject, backward: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds by implementation, and why others are missing."""
    tensors = subject.inputs("cuda")
    candidates: dict[str, Callable[..., Any]] = {
        f"mixerzoo {backend}": lambda *t, backend=backend: subject.ours(*t, backend=backend)
        for backend in ("triton", "eager")
    }
    runs, missing = {}, {}
    for name, function in (candidates | subject.peers).items():
        try:
            runs[name] = _step(function, tensors, backward)
            runs[name]()
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            runs.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return _milliseconds(runs), missing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Time every Triton kernel against its floor and its peers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    names = sorted({s.op for s in subjects()})
    try:
        for name in options.only:
            if name not in names:
                raise unknown("--only", name, names)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py times GPU kernels and found no GPU (torch.cuda.is_available() is False). "
            "What can be known without one is in docs/kernels.md.",
            file=sys.stderr,
        )
        return 2
    device = torch.cuda.get_device_name()
    gpu = next((name for name in GPUS if name in device), None)
    print(f"{device}; torch {torch.__version__}; floors: {gpu or 'none, this GPU is not in kernels/common/costs.py'}")
    costs, rows = find_rooflines(), []
    for subject in subjects():
        if options.only and subject.op not in options.only:
            continue
        for backward in (False, True)[: 1 + subject.backward]:
            times, missing = measure(subject, backward)
            cost = cost_of(subject, backward, costs)
            floor = None if cost is None or gpu is None else cost.floor(gpu)
            print(f"== {subject.op}, {subject.size}, {'forward and backward' if backward else 'forward'}")
            if floor:
                print(f"   {'floor':28} {1e3 * floor[0]:9.3f} ms  ({floor[1]})")
            for name, ms in times.items():
                print(f"   {name:28} {ms:9.3f} ms" + (f"  {ms / floor[0] / 1e3:5.1f} x floor" if floor else ""))
            for name, why in missing.items():
                print(f"   {name:28} {why}")
            rows.append({"op": subject.op, "backward": backward, "floor": floor, "ms": times, "missing": missing})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

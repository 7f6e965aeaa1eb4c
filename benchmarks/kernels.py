"""Time every Triton kernel on a GPU at the sizes of models, beside its floor and its peers.

    python -m mixerzoo.benchmarks.kernels [--only OP ...] [--json FILE] [--prepare] [--rehearse]

Every op runs forward, and forward with backward, at the sizes of its cases (`kernels/<op>/cases.py`): ours on Triton,
our PyTorch path under `torch.compile`, and what is installed of flash-linear-attention, mamba_ssm, causal_conv1d and
PyTorch's own functions (`kernel_peers.py`). First all of ours, then the peers; a run that is cut off has the first.
A time is the median over rounds by GPU events. Inputs rotate among several sets, so that the cache does not hold them,
and the GPU is kept waiting until all launches of a round are queued, so that the host's time is not measured. The
floor is what the compulsory bytes and flops take at the data sheet's rates.

What fails is a row with the reason. Rows are written as they come. `--prepare` calls everything that compiles once, in
parallel processes, and times nothing. `--rehearse` runs small sizes on the CPU, for the script's own sake: its times
mean nothing. Without a GPU it exits with 2.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from mixerzoo.benchmarks.kernel_peers import PEERS
from mixerzoo.errors import ConfigError
from mixerzoo.kernels.common.costs import GPUS, nbytes
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.selftest.case import Case, Draw, tensors
from mixerzoo.kernels.selftest.comparison import is_float

OURS, COMPILED = "ours", "ours in PyTorch, compiled"
ROUNDS = 15
MOST_SETS = 32


@dataclass(frozen=True)
class Job:
    """One time to be taken."""

    op: str
    size: str
    backward: bool
    what: str  # OURS, COMPILED or a peer

    @property
    def key(self) -> dict[str, Any]:
        """The first columns of its row."""
        return {"op": self.op, "size": self.size, "backward": self.backward, "what": self.what}


def jobs_of(names: Sequence[str], *, rehearse: bool = False) -> list[Job]:
    """Everything that is timed: ours first, then other libraries, then our PyTorch path."""
    cases = find_ops(names)
    found: list[tuple[int, Job]] = []
    for name, case in cases.items():
        peers = PEERS.get(name, {})
        for size in ["small"] if rehearse else case.models:
            for backward in (False, True)[: 1 + case.gradients]:
                for rank, what in ((0, OURS), *((1, peer) for peer in peers), (2, COMPILED)):
                    found.append((rank, Job(name, size, backward, what)))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def dims_of(case: Case, job: Job) -> Mapping[str, Any]:
    """Sizes of a job; in rehearsal the first of the small ones, which have no masks and are cut short."""
    if job.size in case.models:
        return case.models[job.size]
    dims = dict(next(iter(case.small.values())).dims)
    if "L" in dims:
        dims["L"] = 2 * dims["block"] if "block" in dims else 32
    for axes in {"grid", "modes"} & {*dims}:
        dims[axes] = tuple(min(n, 7) for n in dims[axes])
    return dims


def function_of(case: Case, job: Job, *, rehearse: bool = False) -> Callable[[Mapping[str, Any]], Any]:
    """What is timed, as a function of the arguments."""
    if job.what == OURS:
        return lambda x: case.run(**x, backend="triton")
    if job.what == COMPILED:
        torch.compiler.reset()  # a function is compiled for so many sizes and no more
        run = torch.compile(case.run, backend="aot_eager" if rehearse else "inductor", dynamic=False)
        return lambda x: run(**x, backend="eager")
    return PEERS[job.op][job.what]


def runs_of(case: Case, job: Job, device: str, *, rehearse: bool = False) -> list[Callable[[], object]]:
    """The same call on several sets of inputs, as many as are larger than the cache twice over."""
    dims, function = dims_of(case, job), function_of(case, job, rehearse=rehearse)
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    cache = torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 0
    size = nbytes(*tensors(case.inputs(Draw("meta", dtype), **dims)))
    count = min(MOST_SETS, math.ceil(2 * cache / size) + 1)

    def prepared(seed: int) -> Callable[[], object]:
        inputs = case.inputs(Draw(device, dtype, seed), **dims)
        if not job.backward:

            def forward() -> object:
                with torch.no_grad():
                    return function(inputs)

            return forward
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if is_float(v)}
        outputs = _outputs(function({**inputs, **leaves}))
        cotangents = [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(
            _outputs(function({**inputs, **leaves})), list(leaves.values()), cotangents, allow_unused=True
        )

    return [prepared(seed) for seed in range(count)]


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def milliseconds(runs: Sequence[Callable[[], object]], device: str, rounds: int = ROUNDS) -> float:
    """Median time of a call; the runs take turns."""
    host = 0.0
    for i in range(3 if device == "cuda" else 1):  # the first compiles and tunes
        start = time.perf_counter()
        runs[i % len(runs)]()
        host = time.perf_counter() - start
        if device == "cuda":
            torch.cuda.synchronize()
    times = []
    for i in range(rounds):
        run = runs[i % len(runs)]
        if device != "cuda":
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # in clocks, below 2 GHz: the GPU waits at least as long as the host takes to queue the call
        torch.cuda._sleep(int(2e9 * min(1.5 * host + 1e-4, 0.05)))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def measure(job: Job, device: str, *, rehearse: bool = False) -> dict[str, Any]:
    """The row of a job; whatever it raises is in it."""
    case = find_ops([job.op])[job.op]
    row: dict[str, Any] = job.key
    try:
        runs = runs_of(case, job, device, rehearse=rehearse)
        row["ms"] = milliseconds(runs, device, 1 if rehearse else ROUNDS)
    except Exception as failure:  # a missing library, a compiler, too little memory: the next job goes on
        row["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:200]}".splitlines()[0]
    gpu = next((name for name in GPUS if device == "cuda" and name in torch.cuda.get_device_name()), None)
    if gpu is not None:
        seconds, row["bound"] = case.cost(job.size, case.models[job.size], job.backward).floor(gpu)
        row["floor_ms"] = 1e3 * seconds
    return row


def broken_context() -> bool:
    """Whether the GPU answers no more in this process, as after a read outside of memory."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _prepare(job: Job) -> str | None:
    case = find_ops([job.op])[job.op]
    try:
        runs_of(case, job, "cuda")[0]()
        torch.cuda.synchronize()
    except Exception as failure:  # it will fail again, in a row of its own
        return f"{job.op} {job.what}: {type(failure).__name__}"
    return None


def prepare(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    """Call once, in parallel, what compiles: peers and our PyTorch path. (Ours: `selftest --compile`.)"""
    wanted = [job for job in jobs if job.what != OURS and job.backward]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(_prepare, job) for job in wanted]):
                if (failure := future.result()) is not None:
                    yield failure
        except BrokenProcessPool as death:  # a compiler or a kernel that crashed; the rest is compiled when it is timed
            yield f"a process died: {death}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Time every Triton kernel beside its floor and its peers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--json", metavar="FILE", help="append rows there, one JSON object a line, as they come")
    parser.add_argument("--prepare", action="store_true", help="only compile, in parallel")
    parser.add_argument("--processes", type=int, default=6, help="of --prepare")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        jobs = jobs_of(options.only, rehearse=options.rehearse)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not options.rehearse:
        print(
            "benchmarks/kernels.py times GPU kernels and found no GPU (torch.cuda.is_available() is False). "
            "What can be known without one is in docs/kernels.md.",
            file=sys.stderr,
        )
        return 2
    if options.prepare:
        for failure in prepare([] if options.rehearse else jobs, options.processes):
            print(f"not prepared: {failure}", flush=True)
        return 0
    device = "cpu" if options.rehearse else "cuda"
    for place, job in enumerate(jobs[options.skip :], options.skip + 1):
        row = measure(job, device, rehearse=options.rehearse)
        text = row.get("failed") or f"{row['ms']:9.4f} ms"
        floor = f"  {row['ms'] / row['floor_ms']:6.1f} x floor ({row['bound']})" if {"ms", "floor_ms"} <= {*row} else ""
        print(f"{job.op:22} {'both' if job.backward else 'fwd ':4} {job.what:26} {text}{floor}", flush=True)
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(row) + "\n")
        if "failed" in row and broken_context():
            again = [sys.executable, "-m", "mixerzoo.benchmarks.kernels", *sys.argv[1:], "--skip", str(place)]
            os.execv(sys.executable, again)
    return 0


if __name__ == "__main__":
    sys.exit(main())

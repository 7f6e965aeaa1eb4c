"""Runs checks: compiled ahead in parallel processes, each op in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from ..common.discovery import find_ops
from .case import Draw
from .check import Check, Outcome, arguments, checks_of, perform
from .comparison import evaluate
from .compiling import compile_only, pinned

SECONDS_PER_OP = 600  # then its process is taken to hang

Task = tuple[str, "Check | str"]


def tasks_of(names: Sequence[str], *, quick: bool = False, models: bool = False) -> list[Task]:
    """What to compile ahead: by op, checks, and with `models` the names of model sizes."""
    found: list[Task] = []
    for name, case in find_ops(names).items():
        found += [(name, check) for check in checks_of(case, quick=quick)]
        found += [(name, size) for size in case.models] if models else []
    return found


def compile_task(task: Task) -> str | None:
    """Compile what a task launches, with every configuration, in a process that is `compile_only`; or say why not."""
    name, what = task
    case = find_ops([name])[name]
    try:
        if isinstance(what, Check):
            inputs = arguments(case, what, "cpu")
        else:
            inputs = case.inputs(Draw(fill=False), **case.models[what])
        index, count = 0, 1
        while index < count:
            with pinned(index) as lengths:
                evaluate(case.run, inputs, gradients=case.gradients, seed=None, backend="triton")
            count, index = max(lengths.values(), default=1), index + 1
    except Exception as failure:  # it will fail again, and be judged, when it is run
        return f"{name}: {type(failure).__name__}: {str(failure)[:300]}"
    return None


def compile_ahead(tasks: Sequence[Task], arch: str, jobs: int) -> Iterator[str]:
    """Fill Triton's cache from parallel processes; yields failures."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=compile_only, initargs=(arch,)) as pool:
        try:
            for future in as_completed([pool.submit(compile_task, task) for task in tasks]):
                if (failure := future.result()) is not None:
                    yield failure
        except BrokenProcessPool as death:  # a compiler that crashed; what is missing is compiled when it is run
            yield f"a compiling process died: {death}"


def run_here(name: str, *, quick: bool, large: bool) -> Iterator[Outcome]:
    """All checks of one op in this process."""
    case = find_ops([name])[name]
    device = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
    for check in checks_of(case, quick=quick, large=large):
        yield perform(case, check, device)


def run_elsewhere(name: str, *, quick: bool, large: bool) -> list[Outcome]:
    """`run_here` in a process of its own: a kernel that reads outside of memory takes only its own op down."""
    command = [sys.executable, "-m", "mixerzoo.kernels.selftest", "--child", "--op", name]
    command += ["--quick"] * quick + ["--large"] * large
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_OP)
        output, end = done.stdout, f"its process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        end, failed = f"no answer within {SECONDS_PER_OP} s", True
    found = [Outcome(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    if failed:
        found.append(Outcome(name, "odd", 0, "-", problem=end))
    return found


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    from triton import knobs

    return knobs.runtime.interpret

"""What can be known of a launch on an H100 without one: `python -m mixerzoo.tools.predict [--only OP ...]`.

Every op is called at the sizes of its models, at batch 1 and at 8, with the default configuration of each kernel,
twice: in a process that compiles for sm_90 and launches nothing, for registers, shared memory, width of loads and the
programs of each launch; and in Triton's interpreter, which runs three programs of each launch, for the bytes that a
program asks for, its products, its other operations and its exponentials. From these the time of each launch is
predicted as the largest of what these take at the data sheet's rates, with no more multiprocessors than there are
programs, and two microseconds for the launch itself. Reductions, shuffles and waiting are left out, and an address
costs as much as a number: a prediction to be held against a measurement, not a measurement.

Prints the table of `docs/kernels.md` (`kernel_docs --prediction` writes it): a row for an op, pass and batch, with the
launch that takes longest. A grid that leaves multiprocessors idle is flagged. `--quick` leaves the interpreter and the
times out, and shows the launch of the fewest programs.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..kernels.common.discovery import find_ops
from ..kernels.selftest.case import Draw
from ..kernels.selftest.comparison import evaluate
from ..kernels.selftest.compiling import CompileOnlyDriver, pinned
from .build import MATRIX_INSTRUCTIONS, cuda_resources
from .traffic import counting

# H100 SXM: data sheet, Hopper tuning guide (resident warps and programs, registers, shared memory)
MULTIPROCESSORS, CLOCK = 132, 1.755e9
WARPS, PROGRAMS, REGISTERS, SHARED = 64, 32, 65536, 233472
HBM, MATMUL, LANES, SPECIAL = 3.35e12, 989e12, 128, 16
FROM_L2 = 64  # bytes in a clock that one multiprocessor can take from the second-level cache
LAUNCH = 2e-6
LATENCY = 6e-7  # seconds until memory answers; times bandwidth, what must be under way to keep it busy
BUSY = HBM * LATENCY / MULTIPROCESSORS
BATCHES = (1, 8)


@dataclass
class Launch:
    """One launch, as both processes see it.

    Attributes:
        kernel: its name.
        programs: of the grid.
        warps, registers, shared: of a program.
        vector: bytes of the widest load.
        asked: bytes that a thread asks for without waiting in between, at most.
        matrix: matrix instructions.
        read, flops, other, exponentials: mean of a program.
    """

    kernel: str
    programs: int
    warps: int = 0
    registers: int = 0
    shared: int = 0
    vector: int = 0
    asked: int = 0
    matrix: str = "-"
    read: float = 0.0
    flops: float = 0.0
    other: float = 0.0
    exponentials: float = 0.0

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        return occupancy(self.registers, self.warps, self.shared)

    @property
    def share(self) -> int:
        """Programs that the busiest multiprocessor runs."""
        return math.ceil(self.programs / MULTIPROCESSORS)

    @property
    def under_way(self) -> int:
        """Bytes that a multiprocessor has asked for at a time."""
        return min(self.resident, self.share) * self.warps * 32 * self.asked

    @property
    def seconds(self) -> tuple[float, str]:
        """Predicted, and what binds."""
        warps = min(self.resident, self.share) * self.warps
        issue = LANES * min(1.0, warps / 8)  # two warps on each of four schedulers hide most of what they wait for
        times = {
            "instructions": self.share * self.other / issue / CLOCK,
            "exponentials": self.share * self.exponentials / SPECIAL / CLOCK,
            "matmul": self.share * self.flops / (MATMUL / MULTIPROCESSORS),
            "cache": self.share * self.read / FROM_L2 / CLOCK,
        }
        bound = max(times, key=times.__getitem__)
        return times[bound] + LAUNCH, bound


def occupancy(registers: int, warps: int, shared: int) -> int:
    """Programs that a multiprocessor of an H100 holds: registers go in lots of 256 for a warp, 1 KB is the system's."""
    lots = math.ceil(max(registers, 1) * 32 / 256) * 256
    return max(1, min(PROGRAMS, WARPS // warps, REGISTERS // lots // warps, SHARED // (shared + 1024)))


def asked_at_once(ptx: str) -> tuple[int, int]:
    """Bytes of the widest load of a thread, and most bytes that the loads of one stretch without branches ask for."""
    widest = most = 0
    for stretch in re.split(r"^\$L__BB\w+:|^\s+(?:@%p\d+ )?bra", ptx, flags=re.M):
        total = 0
        for lanes, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)", stretch):
            size = int(lanes or 1) * int(bits) // 8
            widest, total = max(widest, size), total + size
        for size in re.findall(r"cp\.async\.c[ag][\w.:]* [^;]*?, 0x([0-9a-f]+)", stretch):
            widest, total = max(widest, int(size, 16)), total + int(size, 16)
        most = max(most, total)
    return widest, most


# -- the two processes


def _calls(only: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Every call by "op|size|batch|backward"."""
    for name, case in find_ops(only).items():
        for size, dims in case.models.items():
            for batch in BATCHES:
                for backward in (False, True)[: 1 + case.gradients]:
                    inputs = case.inputs(Draw(fill=False), **{**dims, "B": batch})

                    def call(case: Any = case, inputs: Any = inputs, backward: bool = backward) -> None:
                        evaluate(case.run, inputs, gradients=backward, seed=None, backend="triton")

                    yield f"{name}|{size}|{batch}|{int(backward)}", call


def compile_calls(only: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Launches of every call: kernel, programs and what the compiler made of it."""
    from triton import knobs
    from triton.runtime import driver

    made: dict[str, dict[str, Any]] = {}
    launches: list[dict[str, Any]] = []

    def listen(src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        files = {Path(path).suffix: Path(path) for path in metadata_group.values()}
        registers, _spilled = cuda_resources(files[".cubin"])
        code = files[".ptx"].read_text()
        vector, asked = asked_at_once(code)
        matrix = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, code)]
        made[metadata["hash"]] = {
            "registers": registers, "shared": metadata["shared"], "warps": metadata["num_warps"],
            "vector": vector, "asked": asked, "matrix": "+".join(matrix) or "-",
        }  # fmt: skip

    class Recorder:
        def __init__(self, src: Any, metadata: Any):
            self.kernel, self.hash = src.name, metadata.hash if hasattr(metadata, "hash") else metadata["hash"]

        def __call__(self, x: int, y: int, z: int, *_: Any, **__: Any) -> None:
            launches.append({"kernel": self.kernel, "programs": x * y * z, **made[self.hash]})

    class Driver(CompileOnlyDriver):
        launcher_cls = Recorder  # type: ignore[assignment]

    knobs.compilation.listener = listen
    active: Any = Driver("sm_90")
    driver.set_active(active)
    found = {}
    for key, call in _calls(only):
        launches.clear()
        with pinned(0):
            call()
        found[key] = [dict(launch) for launch in launches]
    return found


def sample(programs: int) -> list[int]:
    """Three programs, from the middle of each third: work may grow along the grid."""
    return list(range(programs)) if programs <= 3 else [programs * i // 6 for i in (1, 3, 5)]


def interpret_calls(only: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Launches of every call: kernel, and what a program asks for and computes, from a sample."""
    from triton.runtime import interpreter

    launches: list[dict[str, Any]] = []
    work: Counter[str] = Counter()
    builder: Any = interpreter.InterpreterBuilder

    def noting(name: str) -> None:
        original = getattr(builder, name)

        def wrapped(self: Any, *args: Any) -> Any:
            result = original(self, *args)
            size = result.data.size
            if size > 1:
                key = "exponentials" if getattr(args[-1], "__name__", "").startswith(("exp", "log")) else "other"
                work[key] += size
            return result

        setattr(builder, name, wrapped)

    for name in ("unary_op", "binary_op", "ternary_op"):
        noting(name)

    def run(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        args_hst, kwargs_hst = self._init_args_hst(args_dev, {k: v for k, v in kwargs.items() if k in known})
        scope = interpreter._patch_lang(self.fn)
        try:
            args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            args = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in args.items()}
            grid: Any = self.grid(args) if callable(self.grid) else self.grid
            grid = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            places = sample(math.prod(grid))
            counts.clear()
            work.clear()
            for place in places:
                index = place // (grid[1] * grid[2]), place // grid[2] % grid[1], place % grid[2]
                interpreter.interpreter_builder.set_grid_idx(*index)
                self.fn(**args)
        finally:
            scope.restore()
        total = counts.get(self.fn.__name__, Counter())
        moved = (total["read"] + total["written"]) / len(places)
        entry = {"kernel": self.fn.__name__, "read": moved, "flops": total["flops"] / len(places)}
        launches.append(entry | {key: work[key] / len(places) for key in ("other", "exponentials")})

    interpreter.GridExecutor.__call__ = run
    found = {}
    with counting() as counts:
        for key, call in _calls(only):
            launches.clear()
            call()
            found[key] = list(launches)
    return found


# -- the table


def predict(only: Sequence[str] = (), *, quick: bool = False) -> dict[str, list[Launch]]:
    """The launches of every call, by "op|size|batch|backward"; `quick`: without what a program computes."""
    halves = []
    for half, interpret in (("compile", "0"), ("interpret", "1"))[: 1 if quick else 2]:
        command = [sys.executable, "-m", "mixerzoo.tools.predict", "--half", half, *["--only", *only] * bool(only)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": interpret})
        if done.returncode:
            raise RuntimeError(f"the process that should {half} ended with {done.returncode}: {done.stderr[-2000:]}")
        halves.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: [Launch(**{**a, **b}) for a, b in zip(launches, launches if quick else halves[1][key], strict=True)]
        for key, launches in halves[0].items()
    }


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def prediction_table(only: Sequence[str] = (), *, quick: bool = False) -> str:
    """A row for every op, size, pass and batch; `quick`: no times, and the launch of the fewest programs."""
    lines = [
        "| op | size | batch | launches | launch | programs | idle of 132 | resident x warps | KB under way "
        "| widest load | matrix | predicted (what binds) | by floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = find_ops(only)
    for key, launches in predict(only, quick=quick).items():
        op, size, batch, backward = key.split("|")
        case = cases[op]
        cost = case.cost(size, {**case.models[size], "B": int(batch)}, backward == "1")
        longest = max(launches, key=lambda launch: -launch.programs if quick else launch.seconds[0])
        floor, floor_binds = cost.floor("H100")
        total = max(sum(launch.seconds[0] for launch in launches), floor + LAUNCH * len(launches))
        binds = longest.seconds[1] if total > floor + LAUNCH * len(launches) else floor_binds
        idle = max(0, MULTIPROCESSORS - longest.programs)
        lines.append(
            f"| {cost.label} | {size.split(':')[0]} | {batch} | {len(launches)} | `{longest.kernel.strip('_')}` "
            f"| {longest.programs:,} | {f'**{idle}**' if idle else 0} | {longest.resident} x {longest.warps} "
            f"| {longest.under_way / 1e3:.0f} | {longest.vector} | {longest.matrix} "
            f"| {'-' if quick else f'{_time(total)} ({binds})'} | {'-' if quick else f'{total / floor:.1f}'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.tools.predict", description="Predict times on an H100.")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--quick", action="store_true", help="what the compiler tells alone: no times")
    parser.add_argument("--half", choices=("compile", "interpret"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        find_ops(options.only)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.half:
        half = compile_calls if options.half == "compile" else interpret_calls
        print("\n" + json.dumps(half(options.only)))
    else:
        print(prediction_table(options.only, quick=options.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())

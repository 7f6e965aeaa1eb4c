"""What `tools/gpu.sh` runs: stages, each a process with a limit of its own, and the table of what they found.

The results of a stage are on disk as soon as they are there (`gpu.json` in the output folder, beside `log.txt`), so
that a run that is cut off still tells something. Shares are those of 420 seconds; `--seconds` scales them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 420
MOST_LINES = 80
Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A process, or several one after the other.

    Attributes:
        share: seconds of `SECONDS`.
        commands: arguments of Python; `{rows}` stands for the file of rows, `{temp}` for a folder that is removed,
            `{rehearse}` for `--rehearse` in a rehearsal and else for nothing.
        lines: rows -> lines of the table.
        rehearsed: other commands for a rehearsal.
        whole: whether it needs the whole package, and so Hydra.
        environment: variables of its own.
    """

    share: int
    commands: tuple[str, ...]
    lines: Callable[[list[Row]], list[str]]
    rehearsed: tuple[str, ...] = ()
    whole: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def _figure(row: Row | None, key: str = "ms", form: str = "{:.3f}") -> str:
    if row is None:
        return "-"
    return form.format(row[key]) if key in row else "failed" if "failed" in row else "-"


def card_lines(rows: list[Row]) -> list[str]:
    """Card, versions and ceilings."""
    return ["; ".join(f"{k} {v}" for k, v in row.items()) for row in rows]


def selftest_lines(rows: list[Row]) -> list[str]:
    """An op a line: the worst error of each dtype."""
    lines = []
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        worst = {d: max(r["error"] for r in mine if r["dtype"] == d) for d in dict.fromkeys(r["dtype"] for r in mine)}
        bad = [r for r in mine if not r["passed"]]
        why = f"FAILED {len(bad)} of {len(mine)}: {(bad[0]['problem'] or bad[0]['where'])[:60]}" if bad else "ok"
        lines.append(f"{op:22} {' '.join(f'{d} {e:.0e}' for d, e in worst.items()):52} {why}")
    return lines


def kernel_lines(rows: list[Row]) -> list[str]:
    """An op and pass a line: ours, over the floor, our PyTorch path compiled, and the fastest peer."""
    lines = [f"{'op':22} {'pass':4} {'size':18} {'ours':>8} {'x floor':>7} {'PyTorch':>8}  best peer (ms)"]
    for op, size, backward in dict.fromkeys((r["op"], r["size"], r["backward"]) for r in rows):
        mine = {r["what"]: r for r in rows if (r["op"], r["size"], r["backward"]) == (op, size, backward)}
        ours, ourselves = mine.pop("ours", None), mine.pop("ours in PyTorch, compiled", None)
        peers = sorted((r for r in mine.values() if "ms" in r), key=lambda r: r["ms"])
        peer = f"{peers[0]['what']} {peers[0]['ms']:.3f}" if peers else "-"
        over = f"{ours['ms'] / ours['floor_ms']:.1f}" if ours and {"ms", "floor_ms"} <= {*ours} else "-"
        lines.append(
            f"{op:22} {'both' if backward else 'fwd':4} {size[:18]:18} {_figure(ours):>8} {over:>7} "
            f"{_figure(ourselves):>8}  {peer}"
        )
        if ours and "failed" in ours:
            lines.append(f"    {ours['failed'][:110]}")
    return lines


def model_lines(rows: list[Row]) -> list[str]:
    """A model and batch a line."""
    lines = []
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        parts = [
            f"{r['what']} {_figure(r)}" + (f" (MFU {r['mfu']:.0%}, {r['peak_gb']:.0f} GB)" if "mfu" in r else "")
            for r in mine
        ]
        lines.append(f"{model:17} batch {batch:3}: {'; '.join(parts)}")
    return lines


def other_lines(rows: list[Row]) -> list[str]:
    """What says nothing but whether it worked."""
    return [" ".join(f"{k} {v}" for k, v in row.items()) for row in rows]


_SELFTEST, _KERNELS = "-m mixerzoo.kernels.selftest", "-m mixerzoo.benchmarks.kernels {rehearse}"
_MODELS = "-m mixerzoo.benchmarks.gpu_models {rehearse}"
_FEW = "shift segment_pool causal_conv1d causal_conv1d_step ssd_step"  # quick ones in the interpreter
STAGES = {
    "card": Stage(15, ("-m mixerzoo.tools.gpu --card {rows}",), card_lines),
    "compile": Stage(
        90,
        (f"{_SELFTEST} --compile", f"{_KERNELS} --prepare"),
        other_lines,
        rehearsed=("-m mixerzoo.tools.gpu --compile-rehearsal", f"{_KERNELS} --prepare"),
    ),
    "selftest": Stage(
        85,
        (f"{_SELFTEST} --json {{rows}}",),
        selftest_lines,
        rehearsed=(f"{_SELFTEST} --quick --op {_FEW} --json {{rows}}",),
    ),
    "tests": Stage(
        40,
        ("-m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_gpu.py",),
        other_lines,
        environment=(("MIXERZOO_TEST_GPU", "1"),),
    ),
    "kernels": Stage(90, (f"{_KERNELS} --json {{rows}}",), kernel_lines),
    "train": Stage(60, (f"{_MODELS} --json {{rows}} train",), model_lines, whole=True),
    "decode": Stage(25, (f"{_MODELS} --json {{rows}} decode",), model_lines, whole=True),
    "run": Stage(
        15,
        ("train.py train.max_steps=40 train.precision=bf16 run_dir={temp}/run",),
        other_lines,
        rehearsed=("train.py train.max_steps=4 run_dir={temp}/run",),
        whole=True,
    ),
}


def run_stage(name: str, stage: Stage, out: Path, *, limit: float, rehearse: bool) -> Row:
    """Run a stage; returns what became of it, with its rows."""
    rows = out / f"{name}.rows"
    rows.unlink(missing_ok=True)
    result: Row = {"stage": name, "limit_s": round(limit), "status": "ok", "rows": []}
    if stage.whole and importlib.util.find_spec("hydra") is None:
        return {**result, "status": "skipped: Hydra is missing; name a folder of wheels with --wheels"}
    environment = os.environ | dict(stage.environment) | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    start = time.monotonic()
    with open(out / "log.txt", "ab") as log, tempfile.TemporaryDirectory() as temp:
        for command in (stage.rehearsed if rehearse else ()) or stage.commands:
            log.write(f"\n== {name}: {command}\n".encode())
            log.flush()
            places = {"rows": rows, "temp": temp, "rehearse": "--rehearse" if rehearse else ""}
            words = [word.format(**places) for word in command.split() if word.format(**places)]
            process = subprocess.Popen(
                [sys.executable, *(["-P"] if words[0] == "-m" else []), *words],
                stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(1.0, limit - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its own group: it and the processes that it started
                process.wait()
                result["status"] = "cut off at its limit"
                break
            if status:
                result["status"] = f"exit status {status}"
    if rows.exists():
        for line in rows.read_text().splitlines():
            try:
                result["rows"].append(json.loads(line))
            except json.JSONDecodeError:  # the line that was being written when the stage was cut off
                continue
        rows.unlink()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def tail_of(name: str, log: Path, count: int = 3) -> list[str]:
    """The last lines of a stage in the log."""
    part = log.read_text(errors="replace").rsplit(f"\n== {name}:", 1)[-1].split("\n== ")[0] if log.exists() else ""
    return [f"    {line[:116]}" for line in part.strip().splitlines()[1:][-count:]]


def table(results: Sequence[Row], log: Path) -> str:
    """At most `MOST_LINES` lines."""
    lines = []
    for result in results:
        stage = STAGES[result["stage"]]
        lines.append(f"== {result['stage']}: {result['status']}, {result.get('seconds', 0)} of {result['limit_s']} s")
        lines += [line[:118] for line in stage.lines(result["rows"])]
        if not result["rows"] or result["status"].startswith("exit"):
            lines += tail_of(result["stage"], log)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... {len(lines) - MOST_LINES + 1} more lines in gpu.json"]
    return "\n".join(lines)


def describe_card(rows: Path) -> None:
    """Write the card, its clocks and what it reaches: a large copy, a large product of bfloat16 matrices."""
    import torch
    import triton

    gpu = torch.cuda.is_available()
    found: Row = {"card": torch.cuda.get_device_name() if gpu else f"none, {platform.machine()}"}
    found |= {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    found |= {"cores": os.cpu_count()}
    if gpu:
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    rows.write_text(json.dumps(found) + "\n")
    size, side = (2**31, 8192) if gpu else (2**22, 128)
    device = "cuda" if gpu else "cpu"

    def seconds(run: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(8):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    source = torch.randint(127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    measured = {
        "copy_TB_per_s": round(2 * size / seconds(lambda: target.copy_(source)) / 1e12, 3),
        "bf16_Tflop_per_s": round(2 * side**3 / seconds(lambda: a @ b) / 1e12, 2),
    }
    if gpu:
        properties = torch.cuda.get_device_properties()
        measured |= {"multiprocessors": properties.multi_processor_count, "L2_MB": properties.L2_cache_size // 2**20}
    with open(rows, "a") as file:
        file.write(json.dumps(measured) + "\n")


def rehearse_compiling() -> None:
    """Compile ahead for a chip that is not there, in two processes."""
    from ..kernels.selftest.running import compile_ahead, tasks_of

    os.environ.pop("TRITON_INTERPRET", None)
    tasks = tasks_of(["shift", "ssd_step"], quick=True, models=True)
    failures = list(compile_ahead(tasks, "sm_90", 2))
    print(f"{len(tasks)} calls compiled for sm_90; {failures}")
    if failures:
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 where every stage ended well."""
    parser = argparse.ArgumentParser(prog="tools/gpu.sh", description=__doc__)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="all together")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="FOLDER")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: interpreter, tiny sizes, no time means anything"
    )
    parser.add_argument("--card", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compile-rehearsal", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.card:
        describe_card(options.card)
        return 0
    if options.compile_rehearsal:
        rehearse_compiling()
        return 0
    try:
        for name in options.only:
            if name not in STAGES:
                raise unknown("--only", name, STAGES)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    results: list[Row] = []
    for name, stage in STAGES.items():
        if options.only and name not in options.only:
            continue
        print(f"{name} ...", flush=True)
        limit = stage.share * options.seconds / SECONDS * (20 if options.rehearse else 1)
        results.append(run_stage(name, stage, out, limit=limit, rehearse=options.rehearse))
        (out / "gpu.json").write_text(json.dumps({"rehearsal": options.rehearse, "stages": results}, indent=1))
    shown = table(results, out / "log.txt")
    (out / "table.txt").write_text(shown + "\n")
    print(shown)
    return 0 if all(r["status"] == "ok" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())

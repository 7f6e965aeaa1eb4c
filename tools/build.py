"""Compile every Triton kernel for GPUs that are not there.

    python -m mixerzoo.tools.build [--arch sm_90 gfx942 ... | --all] [--only OP or OP.CASE ...] [--default] [--jobs N]
                                   [--record]

Triton needs a driver only to ask for its target and to launch. The driver here knows a target and launches nothing, so
running the cases (`kernels/<op>/cases.py`) on CPU tensors compiles whatever they would launch, with every autotune
config (`--default`: the first of each list). Printed are registers, spills (bytes of a thread in local
memory, "scratch" on AMD), shared memory, and the matrix instructions in the code. The exit status is 1 when a kernel
does not compile, needs more shared memory than the chip has, spills in its default config, multiplies 16-bit matrices
without matrix instructions, or needs more than what was recorded for this version of Triton (`build_records.json`):
registers, spills, and the shuffles and barriers of an inner loop, which tell when a new version lays tensors out
differently. `--record` writes the figures of this run over those.

`make build-all` runs it with `--all`, under the oldest and the newest Triton.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown
from ..kernels.common.discovery import Call, find_cases
from ..kernels.selftest.compiling import compile_only

# bytes of shared memory that one program may take: CUDA C Programming Guide, compute capabilities; AMD: the LDS
SHARED_MEMORY = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536,
}  # fmt: skip
USUAL = ("sm_80", "sm_90", "sm_100", "gfx942")  # built when nothing else is asked for
RECORDS = Path(__file__).parent / "build_records.json"
MORE_REGISTERS = 16  # that a kernel may take than what was recorded

MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_s?mfmac?_",
    "wmma": r"\bv_s?wmmac?_",
}


@dataclass
class Built:
    """One compiled kernel."""

    case: str
    kernel: str
    default: bool
    config: dict[str, Any]
    registers: int | None
    spilled: int | None
    shared: int
    matrix: list[str]
    dots: bool  # multiplies matrices of 16-bit numbers
    shuffles: int | None = None  # of that inner loop that has most; None where it is not known
    barriers: int | None = None

    @property
    def key(self) -> str:
        """What a recorded figure stands under."""
        return " ".join([self.case, self.kernel, *(f"{k}={v}" for k, v in self.config.items())])

    @property
    def figures(self) -> list[int | None]:
        """What is recorded."""
        return [self.registers, self.spilled, self.shuffles, self.barriers]


@dataclass
class Report:
    """What became of all cases on one architecture."""

    arch: str
    built: list[Built] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def worse(self, recorded: dict[str, list[int | None]]) -> list[str]:
        """Kernels that need more than was recorded."""
        found = []
        for b in self.built:
            names = ("registers", "bytes spilled", "shuffles in a loop", "barriers in a loop")
            for name, now, before in zip(names, b.figures, recorded.get(b.key, [None] * 4), strict=True):
                slack = MORE_REGISTERS if name == "registers" else 0
                if now is not None and before is not None and now > before + slack:
                    found.append(f"{self.arch}: {b.key}: {now} {name}, {before} were recorded")
        return found

    def problems(self) -> list[str]:
        """Everything that makes the build a failure."""
        found = [f"{self.arch}: {failure}" for failure in self.failures]
        for b in self.built:
            name = f"{self.arch}: {b.case}: {b.kernel} {b.config}"
            if b.shared > SHARED_MEMORY[self.arch]:
                found.append(f"{name}: {b.shared} bytes of shared memory, the chip has {SHARED_MEMORY[self.arch]}")
            if b.default and b.spilled:
                found.append(f"{name}: spills {b.spilled} in its default config")
            if b.default and b.spilled is None:
                found.append(f"{name}: resource usage is unknown")
            if b.dots and not b.matrix:
                found.append(f"{name}: multiplies 16-bit matrices without matrix instructions")
        if not self.built:
            found.append(f"{self.arch}: no kernel was compiled")
        return found

    def table(self) -> str:
        """All kernels, a line each."""
        lines = [f"== {self.arch}: {len(self.built)} kernels built, {len(self.failures)} failures"]
        lines.append(
            f"{'case':36} {'kernel':36} {'regs':>4} {'spill':>5} {'shuf':>4} {'bar':>4} {'shared':>6} {'matrix':12} "
            "config"
        )
        for b in self.built:
            config = " ".join(f"{k}={v}" for k, v in b.config.items())
            lines.append(
                f"{b.case[:36]:36} {b.kernel[:36]:36} {b.registers!s:>4} {b.spilled!s:>5} "
                f"{b.shuffles!s:>4} {b.barriers!s:>4} {b.shared:6} "
                f"{'+'.join(b.matrix) or '-':12} {'default ' if b.default else ''}{config}"
            )
        return "\n".join(lines)


def cuda_resources(cubin: Path) -> tuple[int | None, int | None]:
    """Registers of a thread, and bytes of it that are in memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    output = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", output)
    return (int(found[1]), max(int(found[2]), int(found[3]))) if found else (None, None)


def count_in_loops(assembly: str) -> dict[str, int]:
    """Of every kind of instruction (`SHFL`, `BAR` ...) the largest number in an innermost loop of disassembled code."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
    targets = [(re.search(r"^BRA\b.*`\((\.L\w+)\)", line), end) for end, line in enumerate(code)]
    loops = [(labels.get(t[1], end), end) for t, end in targets if t and labels.get(t[1], end) < end]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    counts = [Counter(re.split(r"[.\s]", line)[0] for line in code[a:b]) for a, b in inner]
    return {kind: max(c[kind] for c in counts) for kind in set().union(*counts)}


def _cuda_loops(cubin: Path) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return count_in_loops(subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout)


def _amd_resources(assembly: str) -> tuple[int | None, int | None]:
    """Vector registers, and bytes of memory of a thread ("scratch"), where spilled vector registers go.

    Scalar registers are spilled, too, into lanes of vector registers and so not into memory: they do not count.
    """
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    if not (registers and scratch and spilled):
        return None, None
    return int(registers[1]), max(int(scratch[1]), 4 * int(spilled[1]))


def _multiplies_16_bit(ttir: str) -> bool:
    """Whether both operands of some `tt.dot` are of 16-bit numbers: `tt.dot %a, %b, %c : tensor<16x16xbf16> * ...`."""
    return any(len(re.findall(r"xb?f16>", line)) >= 2 for line in ttir.splitlines() if "tt.dot " in line)


def build(arch: str, cases: dict[str, Call], *, default_only: bool = False) -> Report:
    """Compile what the cases launch, for `arch`, in this process, which can launch no kernel ever after.

    Needs a process in which no kernel module has been imported under `TRITON_INTERPRET`.
    """
    from triton import knobs
    from triton.runtime import autotuner

    report = Report(arch)
    compile_only(arch)
    current = {"case": "", "default": True}
    seen: set[tuple[str, str]] = set()

    def listen(src: Any, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        files = {Path(path).suffix: Path(path) for path in metadata_group.values()}
        if (src.name, metadata["hash"]) in seen:
            return
        seen.add((src.name, metadata["hash"]))
        if ".cubin" in files:
            code = files[".ptx"].read_text()
            registers, spilled = cuda_resources(files[".cubin"])
            loops = _cuda_loops(files[".cubin"])
            shuffles, barriers = loops.get("SHFL", 0), loops.get("BAR", 0)
        else:
            code = files[".amdgcn"].read_text()
            registers, spilled = _amd_resources(code)
            shuffles = barriers = None
        constants = {src.fn.arg_names[path[0]]: v for path, v in src.constants.items() if len(path) == 1}
        config = {k: v for k, v in constants.items() if k.isupper() and isinstance(v, (int, str))}
        config |= {"warps": metadata["num_warps"], "stages": metadata.get("num_stages")}
        report.built.append(
            Built(
                case=current["case"],
                kernel=src.name,
                default=current["default"],
                config=config,
                registers=registers,
                spilled=spilled,
                shared=metadata["shared"],
                matrix=[name for name, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, code)],
                dots=_multiplies_16_bit(files[".ttir"].read_text()),
                shuffles=shuffles,
                barriers=barriers,
            )
        )

    def run_every_config(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.configs[:1] if default_only else self.prune_configs(kwargs)
        for i, config in enumerate(configs):
            current["default"] = i == 0
            try:
                self.fn.run(*args, **kwargs, **config.all_kwargs())
            except Exception as error:  # any failure of the compiler is a finding
                report.failures.append(f"{current['case']}: {self.fn.__name__} {config}: {_short(error)}")
        current["default"] = True
        self.nargs = None

    knobs.compilation.listener = listen
    autotuner.Autotuner.run = run_every_config
    for name, case in cases.items():
        current["case"] = name
        try:
            case()
        except Exception as error:  # of the compiler, or of host code that cannot run without values
            report.failures.append(f"{name}: {_short(error)}")
    return report


class Records:
    """What kernels needed before: by version of Triton (major.minor), architecture and kernel."""

    def __init__(self, path: Path = RECORDS) -> None:
        self.path = path
        self.figures: dict[str, dict[str, dict[str, list[int | None]]]] = {}
        if path.exists():
            self.figures = json.loads(path.read_text())
        version = importlib.metadata.version("triton")
        self.here = self.figures.setdefault(".".join(version.split(".")[:2]), {})

    def of(self, arch: str) -> dict[str, list[int | None]]:
        """Registers, bytes spilled, shuffles and barriers of an inner loop, by kernel; nothing where none are known."""
        return self.here.get(arch, {})

    def put(self, report: Report) -> None:
        """Take over the figures of a report, in the place of those of the same cases."""
        cases = {b.case for b in report.built}
        kept = {k: v for k, v in self.of(report.arch).items() if k.split(" ")[0] not in cases}
        self.here[report.arch] = dict(sorted((kept | {b.key: b.figures for b in report.built if b.default}).items()))

    def write(self) -> None:
        """Into the file, a line for each kernel."""
        text = json.dumps(self.figures, indent=1, sort_keys=True)
        self.path.write_text(re.sub(r"\[\s+([^\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 800 else f"{text[:400]} ... {text[-400:]}"  # the compiler quotes the kernel in between


def build_elsewhere(arch: str, only: Sequence[str] = (), *, default_only: bool = False) -> Report:
    """`build` in a process of its own: a driver cannot be changed after the first kernel."""
    command = [sys.executable, "-m", "mixerzoo.tools.build", "--child", "--arch", arch]
    command += ["--only", *only] * bool(only) + ["--default"] * default_only
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MIXERZOO_AUTOTUNE")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    last = done.stdout.splitlines()[-1:] or [""]
    if done.returncode or not last[0].startswith("{"):
        return Report(arch, failures=[f"the compiling process ended with {done.returncode}: {done.stderr[-2000:]}"])
    data = json.loads(last[0])
    return Report(arch, [Built(**b) for b in data["built"]], data["failures"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.tools.build", description="Compile all kernels.")
    parser.add_argument("--arch", nargs="+", default=USUAL, metavar="ARCH", help=", ".join(SHARED_MEMORY))
    parser.add_argument("--all", action="store_true", help="every architecture")
    parser.add_argument("--record", action="store_true", help="write what was found into build_records.json")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="ops or cases, e.g. ssd or ssd.forward")
    parser.add_argument("--default", action="store_true", help="only the first config of each autotune list")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="architectures at a time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        for arch in options.arch:
            if arch not in SHARED_MEMORY:
                raise unknown("--arch", arch, SHARED_MEMORY)
        cases = find_cases(options.only)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.child:
        print("\n" + json.dumps(asdict(build(options.arch[0], cases, default_only=options.default))))
        return 0
    problems = []
    records = Records()
    archs = SHARED_MEMORY if options.all else options.arch
    with ThreadPoolExecutor(options.jobs) as pool:
        for report in pool.map(lambda a: build_elsewhere(a, options.only, default_only=options.default), archs):
            print(report.table(), flush=True)
            problems += report.problems()
            if options.record:
                records.put(report)
            else:
                problems += report.worse(records.of(report.arch))
    if options.record:
        records.write()
    print("\n".join([f"{len(problems)} problems", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

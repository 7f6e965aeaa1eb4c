"""How long people wait for a first answer: the import, a typo, the help, a list, a table; beside `import torch`.

    python benchmarks/startup.py [ROUNDS]

Every answer is a process of its own, and all take turns, so that whatever else the machine does falls on all alike.
Printed are medians: the seconds on the clock, those of the processor (which a busy machine changes little), and both
over `import torch` of the same round.

On two cores of a Xeon that other processes used, too, one round, Python 3.11, torch 2.14, seconds of the processor
over `import torch` (2.26): the import 0.22, a typo 0.77, --help 0.29, mixer=mamba2 --help 0.43, list mixers 1.56, list
models 1.02, show mamba2 0.99, show caformer_s18 4.02. A quiet machine has not been measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import mixerzoo": ["-c", "import mixerzoo"],
    "a typo": ["-m", "mixerzoo", "train", "mixer=poolin"],
    "--help": ["-m", "mixerzoo", "train", "--help"],
    "mixer=mamba2 --help": ["-m", "mixerzoo", "train", "mixer=mamba2", "--help"],
    "python -m mixerzoo": ["-m", "mixerzoo", "--help"],
    "list mixers": ["-m", "mixerzoo", "list", "mixers"],
    "list models": ["-m", "mixerzoo", "list", "models", "*former*"],
    "show mamba2": ["-m", "mixerzoo", "show", "mamba2"],
    "show caformer_s18": ["-m", "mixerzoo", "show", "caformer_s18"],
}


def answer(arguments: list[str], environment: dict[str, str], folder: str) -> tuple[float, float]:
    """Seconds on the clock and of the processor that a command takes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main(rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mixerzoo").symlink_to(ROOT)  # this checkout, whatever its folder is called
        environment = {**os.environ, "PYTHONPATH": folder, "MIXERZOO_PLUGINS": ""}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for turn in range(rounds + 1):  # the first fills the caches
            names = list(COMMANDS)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                taken = answer(COMMANDS[name], environment, folder)
                if turn:
                    seconds[name].append(taken)
    base = seconds["import torch"]
    print(f"{'seconds':22}{'clock':>8}{'over':>8}{'processor':>12}{'over':>8}")
    for name, values in seconds.items():
        cells = []
        for kind in (0, 1):
            own = [value[kind] for value in values]
            over = [value - torch[kind] for value, torch in zip(own, base, strict=True)]
            cells += [statistics.median(own), statistics.median(over)]
        print(f"{name:22}{cells[0]:8.2f}{cells[1]:8.2f}{cells[2]:12.2f}{cells[3]:8.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)

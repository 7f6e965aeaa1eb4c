"""What arms cost, measured side by side: throughput, peak memory, decoding, and growth with the sequence length.

Arms take turns within one process, so that whatever else the machine does falls on all of them alike. The figures are
kept in the ablation's folder and measured once; `python -m mixerzoo.training.ablation.costs FOLDER` measures again, for
example when the machine has become quiet.

Axis letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...tasks import Batch, Task
from .. import run_folder as report
from ..cost import count_parameters, measure_activation_bytes, measure_flops, spread
from ..prepare import make_model
from .plan import Cell, Plan, load_plan, open_task
from .report.collect import COSTS
from .report.statistics import exponent

_ROUNDS = 7
_SECONDS = 60.0  # about the longest time for the rounds of one point; fewer rounds, at least 3, where they take longer
_DECODED = 16  # tokens of a timed decoding


def measure(plan: Plan, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure all arms of a plan and write the figures into its folder.

    Args:
        plan: of the ablation.
        say: told what is measured.
    """
    cells: dict[str, dict[str, Any]] = {}
    points = plan.ablation.points()
    # what varies in the data or the width hardly changes which arm is fast; each point is still measured
    for point in points:
        here = [cell for cell in plan.cells if cell.point == point]
        say(f"measuring {len(here)} arms" + (f" at {point}" if point else ""))
        cells |= _point(here)
    values: dict[str, Any] = {"cells": cells, "environment": report.environment(), "settings": {"rounds": _ROUNDS}}
    if plan.ablation.scaling is not None:
        values["scaling"] = _scaling(plan, say)
        for label, lines in values["scaling"]["arms"].items():
            cells.setdefault(label, {}).update(_exponents(lines))
    report.write_json(plan.folder / COSTS, values)
    return values


def _device(cell: Cell) -> torch.device:
    use = cell.config.train.device != "cpu" and torch.accelerator.is_available()
    return torch.device("cuda") if use and torch.cuda.is_available() else torch.device("cpu")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - start


class Passes:
    """A training step (forward and backward, no optimizer) and a forward pass of an arm on a batch of its data.

    Args:
        cell: the arm.
        task: opened.
    """

    def __init__(self, cell: Cell, task: Task) -> None:
        self.device, self.task = _device(cell), task
        self.model = make_model(cell.config, task).to(self.device)
        size = min(cell.config.train.batch_size // cell.config.train.accumulate, task.size("train"))
        generator = torch.Generator().manual_seed(0)
        batch = task.fetch("train", torch.arange(size), train=True, generator=generator)
        self.batch: Batch = {key: value.to(self.device) for key, value in batch.items()}
        self.inputs = tuple(x.to(self.device) for x in task.example(size))
        self.count = task.count(self.batch)

    def train(self) -> None:
        """Forward and backward."""
        self.model.train()
        self.task.loss(self.model, self.batch).backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def infer(self) -> None:
        """Forward alone."""
        self.model.eval()
        with torch.no_grad():
            self.model(*self.inputs)


def _point(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    passes: dict[str, Passes] = {}
    for cell in cells:
        task = open_task(cell.config)
        one = passes[cell.label] = Passes(cell, task)
        one.train()
        one.infer()
        example = tuple(x.to(one.device) for x in task.example(1))
        one.model.eval()
        found[cell.label] = {
            "parameters": count_parameters(one.model),
            "flops": measure_flops(one.model, *example),
            "activation_bytes": measure_activation_bytes(one.model, *example),
            "peak_bytes": peak_added(one.train, one.device),
            **_streaming(one),
        }
    rounds = _rounds([p.train for p in passes.values()] + [p.infer for p in passes.values()], cells)
    times: dict[str, dict[str, list[float]]] = {label: {"train": [], "infer": []} for label in passes}
    names = list(passes)
    for i in range(rounds):
        for label in names[i % len(names) :] + names[: i % len(names)]:
            one = passes[label]
            times[label]["train"].append(_timed(one.train, one.device))
            times[label]["infer"].append(_timed(one.infer, one.device))
    for label, kinds in times.items():
        for kind, seconds in kinds.items():
            found[label][f"{kind}_throughput"] = spread([passes[label].count / s for s in seconds])
    return found


def _rounds(functions: Sequence[Callable[[], None]], cells: Sequence[Cell]) -> int:
    device = _device(cells[0])
    once = sum(_timed(function, device) for function in functions)
    return max(3, min(_ROUNDS, int(_SECONDS / once)))


def _streaming(one: Passes) -> dict[str, Any]:
    """State and time per decoded token at the task's length; nothing for models that do not decode."""
    model: Any = one.model
    if not hasattr(model, "state_bytes") or not hasattr(model, "step"):
        return {}
    tokens = one.inputs[0][:1]
    start = max(1, tokens.shape[1] - _DECODED)
    try:
        model.eval()
        with torch.no_grad():
            _, state = model.prefill(tokens[:, :start])
            seconds = []
            for i in range(start, tokens.shape[1]):
                before = time.perf_counter()
                _, state = model.step(tokens[:, i], state)
                _synchronise(one.device)
                seconds.append(time.perf_counter() - before)
        held = model.state_bytes(tokens.shape[1])
    except ConfigError:  # says that the model, or one of its mixers, does not decode token by token
        return {}
    return {"state_bytes": held, "decode_seconds": statistics.median(seconds)} if seconds else {"state_bytes": held}


# -- memory


def _trim() -> None:
    """Hand freed memory back to the system, where that is glibc's to do, so that it is counted when taken again."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library: the peak comes out too small, if anything
            return


def _resident(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def peak_added(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which a call raises the memory in use at its peak.

    On CUDA what PyTorch has allocated; on Linux' CPUs the process's resident memory, whose peak the kernel lets us
    reset; elsewhere None.
    """
    if device.type == "cuda":
        _synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    resident = _resident("VmRSS")
    function()
    peak = _resident("VmHWM")
    return None if resident is None or peak is None else max(0, peak - resident)


# -- growth with the sequence length


def _scaling(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Training step, forward pass, activations and peak of all arms over the lengths, shortest first."""
    settings = plan.ablation.scaling
    cells = [cell for cell in plan.cells if cell.point == plan.ablation.points()[0]]
    lines: dict[str, list[dict[str, Any]]] = {cell.label: [] for cell in cells}
    stopped: dict[str, str] = {}
    for length in settings.lengths:
        say(f"measuring at {length} tokens")
        here: dict[str, tuple[nn.Module, Tensor]] = {}
        for cell in cells:
            reason = stopped.get(cell.label) or _too_much(lines[cell.label], length, settings)
            if reason:
                stopped.setdefault(cell.label, reason)
                continue
            try:
                here[cell.label] = _at_length(cell, length, settings.batch_size)
            except ConfigError as error:
                stopped[cell.label] = str(error)
        _measure_length(here, lines, length, settings.rounds)
    return {"lengths": settings.lengths, "batch_size": settings.batch_size, "arms": lines, "stopped": stopped}


def _at_length(cell: Cell, length: int, batch: int) -> tuple[nn.Module, Tensor]:
    task = open_task(cell.config)
    demanded = task.model_kwargs()
    if "vocab_size" not in demanded:
        raise ConfigError("ablation.scaling: the task has no tokens; growth is measured over sequences.")
    config = replace(cell.config, model={**cell.config.model})
    model = make_model(config, _Longer(task, length)).to(_device(cell))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(demanded["vocab_size"]), (batch, length), generator=generator).to(_device(cell))
    with torch.no_grad():
        model(ids)  # some lengths are refused only here, which stops one arm, not all
    return model, ids


class _Longer:
    """A task as a model sees it, at another sequence length."""

    def __init__(self, task: Task, length: int) -> None:
        self.task, self.length = task, length

    def model_kwargs(self) -> dict[str, Any]:
        return {**self.task.model_kwargs(), "sequence_length": self.length}


def _too_much(lines: Sequence[dict[str, Any]], length: int, settings: Any) -> str:
    """Why the next length is left out, from the growth between the last two; empty if it is not."""
    if len(lines) < 2:
        return ""
    a, b = lines[-2:]
    for key, limit, unit in (
        ("train_seconds", settings.max_seconds, "s"),
        ("activation_bytes", settings.max_bytes, "B"),
    ):
        low, high = (x[key]["median"] if isinstance(x[key], dict) else x[key] for x in (a, b))
        if low > 0 and high > 0:
            power = max(0.0, exponent([a["length"], b["length"]], [low, high]))
            expected = high * (length / b["length"]) ** power
            if expected > limit:
                return f"{length} tokens were left out: about {expected:.2g} {unit} for {key}, more than {limit:.2g}"
    return ""


def _measure_length(
    here: dict[str, tuple[nn.Module, Tensor]], lines: dict[str, list[dict[str, Any]]], length: int, rounds: int
) -> None:
    def train(label: str) -> None:
        model, ids = here[label]
        model.train()
        model(ids).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    def infer(label: str) -> None:
        model, ids = here[label]
        model.eval()
        with torch.no_grad():
            model(ids)

    times: dict[str, dict[str, list[float]]] = {label: {"train": [], "infer": []} for label in here}
    figures: dict[str, dict[str, Any]] = {}
    for label, (model, ids) in here.items():
        train(label)  # warm-up
        figures[label] = {
            "peak_bytes": peak_added(lambda label=label: train(label), ids.device),
            "activation_bytes": measure_activation_bytes(model, ids),
            "flops": measure_flops(model.eval(), ids),
        }
    names = list(here)
    for i in range(rounds):
        for label in names[i % len(names) :] + names[: i % len(names)] if names else []:
            device = here[label][1].device
            times[label]["train"].append(_timed(lambda label=label: train(label), device))
            times[label]["infer"].append(_timed(lambda label=label: infer(label), device))
    for label in here:
        line = {"length": length, **figures[label]}
        line |= {f"{kind}_seconds": spread(values) for kind, values in times[label].items()}
        lines[label].append(line)


def _exponents(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth of time and memory over the upper half of the lengths, where fixed costs count less, and over all."""
    upper = lines[len(lines) // 2 :] if len(lines) > 3 else lines
    found = {}
    for name, key in (("time", "train_seconds"), ("inference", "infer_seconds"), ("memory", "activation_bytes")):
        for suffix, part in (("", upper), ("_all", lines)):
            values = [line[key]["median"] if isinstance(line[key], dict) else line[key] for line in part]
            found[f"{name}_exponent{suffix}"] = exponent([line["length"] for line in part], values)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m mixerzoo.training.ablation.costs FOLDER...`: measure again and write the reports anew."""
    from .report.build import build_report

    folders = sys.argv[1:] if arguments is None else arguments
    if not folders:
        print("usage: python -m mixerzoo.training.ablation.costs FOLDER...", file=sys.stderr)
        return 2
    for folder in folders:
        try:
            plan = load_plan(Path(folder))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        measure(plan, print)
        build_report(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())

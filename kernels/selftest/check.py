"""One check of the self-test: a case at one size and dtype, held against the reference in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.costs import nbytes
from .case import Case, Draw, tensors
from .comparison import TOLERANCE, Inputs, error, evaluate, skewed, widen
from .compiling import pinned

# A GPU's exponentials and logarithms are good to two places, and long sums run in another order: twice what the
# interpreter is held to, and five times in float32, where TF32 by mistake would be ten times more than that.
LIMITS = {
    torch.float32: 5 * TOLERANCE[torch.float32],
    torch.bfloat16: 2 * TOLERANCE[torch.bfloat16],
    torch.float16: 2 * TOLERANCE[torch.float16],
}
LIMITS |= {torch.complex64: LIMITS[torch.float32]}
KINDS = ("odd", "strided", "long", "huge")
LONG = 131_072  # tokens
HUGE = 2**31  # numbers in the largest tensor


@dataclass(frozen=True)
class Check:
    """What is run.

    Attributes:
        op: name of the public function.
        kind: "odd" sizes; the same "strided"; a "long" sequence; a "huge" batch.
        place: which of the case's odd sizes (or models).
        dtype: of the inputs.
    """

    op: str
    kind: str
    place: int
    dtype: torch.dtype


@dataclass
class Outcome:
    """What came of a check.

    Attributes:
        op, kind, place, dtype: those of the check; the dtype by its name.
        error: the worst relative error of all outputs and gradients.
        limit: what is allowed.
        where: which output or gradient had it, and with which configurations.
        problem: why it failed though the error is small (it raised, two runs differed ...), or None.
        skipped: why it was not run, or None.
    """

    op: str
    kind: str
    place: int
    dtype: str
    error: float = 0.0
    limit: float = 0.0
    where: str = ""
    problem: str | None = None
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None and self.error <= self.limit


def checks_of(case: Case, *, quick: bool = False, large: bool = False) -> list[Check]:
    """All checks of a case; `quick`: one size in two dtypes; `large`: also what takes minutes and gigabytes."""
    dtypes = [d for d in case.dtypes if not quick or d != torch.float16]
    found = [Check(case.name, "odd", i, d) for i in range(len(case.odd[: 1 if quick else None])) for d in dtypes]
    found += [Check(case.name, "strided", 0, dtypes[0])]
    if large:
        half = case.dtypes[min(1, len(case.dtypes) - 1)]
        found += [Check(case.name, "huge", 0, half)]
        found += [Check(case.name, "long", 0, half)] if "L" in next(iter(case.models.values())) else []
    return found


def arguments(case: Case, check: Check, device: str) -> dict[str, Any]:
    """The arguments of a check of odd sizes."""
    inputs = case.inputs(Draw(device, check.dtype, seed=check.place), **case.odd[check.place])
    if check.kind == "strided":
        inputs = {k: skewed(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Meanwhile uninitialised memory is filled with NaN (with the largest value for integers): forgetting shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module with a property, which no type checker knows
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def perform(case: Case, check: Check, device: str) -> Outcome:
    """Run a check. Whatever a kernel raises is an outcome."""
    outcome = Outcome(check.op, check.kind, check.place, str(check.dtype).removeprefix("torch."))
    outcome.limit = LIMITS[check.dtype]
    try:
        with poisoned():
            if check.kind in ("odd", "strided"):
                _every_config(case, arguments(case, check, device), outcome)
            else:
                _large(case, check, device, outcome)
    except torch.cuda.OutOfMemoryError as lack:
        outcome.skipped = str(lack).splitlines()[0]
    except Exception as failure:  # a compiler's, a launch's or the op's own: each makes the op unusable
        outcome.problem = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
    return outcome


def _every_config(case: Case, inputs: Inputs, outcome: Outcome) -> None:
    from triton.runtime.errors import OutOfResources

    wanted = evaluate(case.run, widen(inputs), gradients=case.gradients, backend="reference")
    index, count, ran = 0, 1, 0
    lack: Exception | None = None
    while index < count:
        try:
            with pinned(index) as lengths:
                found = evaluate(case.run, inputs, gradients=case.gradients, backend="triton")
                again = found if ran else evaluate(case.run, inputs, gradients=case.gradients, backend="triton")
        except OutOfResources as large:  # too large for this card; tuning leaves such a configuration out
            lack, index, count = large, index + 1, max(count, *lengths.values(), 1)
            continue
        count = max(lengths.values(), default=1)
        _judge(found, wanted, outcome, f" with configuration {index} of {count}" if count > 1 else "")
        changed = [name for name, y in found.items() if not torch.equal(_bits(y), _bits(again[name]))]
        if changed and outcome.problem is None:
            outcome.problem = f"two runs differ in {', '.join(changed)}"
        index, ran = index + 1, ran + 1
    if lack is not None and not ran:
        raise lack


def _judge(found: dict[str, Tensor], wanted: dict[str, Tensor], outcome: Outcome, where: str) -> None:
    for name, y in found.items():
        e = error(y, wanted[name])
        if not outcome.where or e > outcome.error:
            outcome.error, outcome.where = e, name + where


def _bits(x: Tensor) -> Tensor:
    """So that NaN equals itself."""
    return torch.view_as_real(x).contiguous().view(torch.int32) if x.is_complex() else x.nan_to_num()


def _large(case: Case, check: Check, device: str, outcome: Outcome) -> None:
    """The last row of a huge batch against the reference, or a long sequence against the eager path, in float64."""
    dims = dict(next(iter(case.models.values())))
    if check.kind == "long":
        dims |= {"B": 1, "L": LONG}
    else:
        row = max(x.numel() for x in tensors(case.inputs(Draw("meta", check.dtype), **{**dims, "B": 2}))) // 2
        dims |= {"B": HUGE // row + 2}
    sizes = case.inputs(Draw("meta", check.dtype), **dims)
    # inputs, outputs, their gradients, and as much again in between
    needed = (8 if case.gradients else 4) * nbytes(*tensors(sizes))
    if device == "cuda" and needed > torch.cuda.mem_get_info()[0]:
        outcome.skipped = f"needs about {math.ceil(needed / 2**30)} GB"
        return
    inputs = case.inputs(Draw(device, check.dtype), **dims)
    with pinned(0):
        found = evaluate(case.run, inputs, gradients=case.gradients, seed=None, backend="triton")
    oracle = "eager" if check.kind == "long" else "reference"
    if check.kind == "huge":
        batched = _batched(case, check, dims)
        inputs = {k: v[-1:] if k in batched else v for k, v in inputs.items()}
        found = {k: y[-1:] for k, y in found.items() if k.startswith("output") or k.split()[-1] in batched}
    wanted = evaluate(case.run, widen(inputs), gradients=case.gradients, seed=None, backend=oracle)
    _judge(found, wanted, outcome, f" at {dims}")


def _batched(case: Case, check: Check, dims: dict[str, Any]) -> Sequence[str]:
    """Names of the tensors with a row for each member of the batch."""
    one, two = (case.inputs(Draw("meta", check.dtype), **{**dims, "B": b}) for b in (1, 2))
    return [k for k, x in two.items() if isinstance(x, Tensor) and x.shape != one[k].shape]

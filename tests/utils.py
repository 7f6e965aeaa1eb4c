"""What several tests need. Import it as `from mixerzoo.tests.utils import ...`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

OWN = Path(__file__).parent / "golden"
# other fixtures of the same names, with other sizes and options: MIXERZOO_GOLDEN=folder pytest -k "golden or official"
GOLDEN = Path(os.environ.get("MIXERZOO_GOLDEN") or OWN)


@dataclass
class Golden:
    """Numbers of an official implementation: see `tests/golden/README.md`."""

    tensors: dict[str, Tensor]
    meta: dict[str, str]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose key is `prefix` (under the name "") or starts with `prefix.`, with the prefix removed."""
        found = {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}
        if prefix in self.tensors:
            found[""] = self.tensors[prefix]
        return found

    def json(self, key: str, default: Any = None) -> Any:
        """A metadata entry that holds JSON."""
        return json.loads(self.meta[key]) if key in self.meta else default

    @property
    def params(self) -> dict[str, Tensor]:
        """Official parameters and buffers."""
        return self.group("param")

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the official constructor."""
        return self.json("kwargs", {})

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


def load_golden(name: str) -> Golden:
    """Read `<name>.safetensors` of `tests/golden`, or of another folder, for which a test is skipped where it lacks it.

    Sizes and options come from the fixture: a test must pass on any that the official code makes.
    """
    path = GOLDEN / f"{name}.safetensors"
    if GOLDEN != OWN and not path.is_file():
        pytest.skip(f"{GOLDEN} has no {name}", allow_module_level=True)
    with safe_open(str(path), framework="pt") as f:
        return Golden({k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {})  # noqa: SIM118 - not a dict


def rounding(dtype: torch.dtype, *lengths: int) -> float:
    """What rounding may leave of a chain of sums of so many terms each, relative to the largest result.

    Every sum rounds what it reads and what it gives to the dtype, half an eps each, and adds up in float32, whose
    errors grow as the square root of the terms.
    """
    accumulated = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    return sum(torch.finfo(dtype).eps + accumulated * length**0.5 for length in lengths)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|, with NaN counted as infinite."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    error = (ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)
    return float("inf") if error.isnan() else float(error)


def check_golden(
    golden: Golden,
    module: nn.Module,
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    *,
    to_ours: Callable[[Tensor], Tensor] = lambda x: x,
    to_theirs: Callable[[Tensor], Tensor] = lambda x: x,
    forward: Callable[..., Tensor] | None = None,
    output_tol: float = 1e-5,
    grad_tol: float = 2e-5,
) -> None:
    """Load official parameters into `module`; compare output, input gradient and every parameter gradient.

    For fixtures with one input and one output. `convert` maps official names and layouts to ours and is used for the
    parameters and, as it only renames and reshapes, for their gradients.
    """
    module.load_state_dict(dict(convert(golden.params)))
    module.eval()
    x = golden["input"].clone().requires_grad_()
    output = to_theirs((forward or module)(to_ours(x)))
    assert relative_error(output, golden["output"]) < output_tol, (
        f"output {relative_error(output, golden['output']):.2e}"
    )
    (output * golden["cotangent"]).sum().backward()
    assert x.grad is not None
    error = relative_error(x.grad, golden["grad.input"])
    assert error < output_tol * 2, f"grad.input {error:.2e}"

    theirs = golden.group("grad.param")
    noisy = golden.json("noisy_grad_params", {})
    zero = set(golden.json("zero_grad_params", []))
    largest = max((float(g.abs().max()) for g in theirs.values()), default=1.0)
    filled = {n: theirs.get(n, torch.zeros_like(p, dtype=torch.float32)) for n, p in golden.params.items()}
    expected = convert(filled)
    # convert() also of a marker, to know which official parameters stand behind one of ours
    marks = {n: torch.full_like(filled[n], float(i)) for i, n in enumerate(filled)}
    order = list(filled)
    behind = {n: {order[int(i)] for i in m.unique().tolist()} for n, m in convert(marks).items()}
    checked = 0
    for name, parameter in module.named_parameters():
        sources = behind.get(name, set())
        if sources and not sources & set(theirs):
            continue  # the official code gives it no gradient
        assert parameter.grad is not None, f"{name} has no gradient"
        if sources and sources <= zero:
            assert float(parameter.grad.abs().max()) < 1e-5 * largest, name
            continue
        tolerance = max([grad_tol] + [20 * float(noisy[s]) for s in sources if s in noisy])
        error = relative_error(parameter.grad, expected[name])
        assert error < tolerance, f"grad of {name}: {error:.2e} >= {tolerance:.1e}"
        checked += 1
    assert checked or not theirs, "no gradient was compared"

"""How ops are compared and how kernels are broken on purpose.

A test file for an op consists of: `check_reference` (gradcheck in float64), closed forms on tiny cases, golden values,
`compare` of eager and Triton with the reference, `opcheck`, `torch.compile(fullgraph=True)`, and mutations:

    MUTANTS = [("acc += w * x", "acc = w * x"), ("t < length", "t <= length")]

    @pytest.mark.parametrize(("old", "new"), MUTANTS)
    def test_broken_kernel_is_caught(old, new, tmp_path):
        with mutated("pool_mix", old, new, tmp_path):
            assert not agrees(case)

`agrees(case)` is `compare` as a bool, where `case` is the smallest case that exposes the mutant.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from mixerzoo.kernels.common import registration
from torch import Tensor

KERNELS = Path(registration.__file__).parents[1]
# Of half precisions two and a half roundings of the largest value (2^-8 and 2^-11 each): one is that of the result, the
# rest is for values that are rounded on the way, between kernels and before matrix units.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.25e-3}
_counter = itertools.count()

Run = Callable[..., Tensor | tuple[Tensor, ...]]


def run(op: Run, inputs: Mapping[str, Tensor | None], *, seed: int = 0, **options) -> dict[str, Tensor]:
    """Call `op(**inputs, **options)`; return its outputs and, under random cotangents, the gradient of every input.

    Float inputs are differentiated; inputs that have no gradient (integers, None) are passed on.
    """
    leaves = {
        k: v.detach().requires_grad_()
        for k, v in inputs.items()
        if v is not None and (v.is_floating_point() or v.is_complex())
    }
    result = op(**{**inputs, **leaves}, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def widen(inputs: Mapping[str, Tensor | None], dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    """The same values in a wider dtype, for the oracle."""
    wide = {torch.float64: torch.complex128, torch.float32: torch.complex64}[dtype]
    return {
        k: v if v is None or not (v.is_floating_point() or v.is_complex()) else v.to(wide if v.is_complex() else dtype)
        for k, v in inputs.items()
    }


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|; NaN and infinity count as infinite."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    if not ours.numel():
        return 0.0
    wide = torch.complex128 if ours.is_complex() else torch.float64
    e = (
        ours.detach().to(wide) - theirs.detach().to(wide)
    ).abs().max() / theirs.detach().abs().max().double().clamp_min(1e-30)
    return float(e) if torch.isfinite(e) else float("inf")


def errors(op: Run, inputs: Mapping[str, Tensor | None], backend: str, **options) -> dict[str, float]:
    """Relative error of every output and gradient of `backend` against the reference in float64."""
    ours = run(op, inputs, backend=backend, **options)
    theirs = run(op, widen(inputs), backend="reference", **options)
    return {k: error(v, theirs[k]) for k, v in ours.items()}


def compare(
    op: Run,
    inputs: Mapping[str, Tensor | None],
    backend: str,
    *,
    tolerance: float | None = None,
    loose: Mapping[str, float] | None = None,
    **options,
) -> None:
    """Outputs and gradients of `backend` must equal the float64 reference.

    Args:
        op: the public function; takes `backend`.
        inputs: tensors by argument name; their dtype decides the tolerance.
        backend: "eager" or "triton".
        tolerance: relative to the largest value; by default from the least precise dtype.
        loose: own tolerances by name, e.g. `{"gradient of A": 1e-4}`, with the reason beside it.
        options: passed to the op.
    """
    dtypes = [
        {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(v.dtype, v.dtype)
        for v in inputs.values()
        if v is not None and (v.is_floating_point() or v.is_complex())
    ]
    limit = tolerance or max(TOLERANCE[d] for d in dtypes)
    found = errors(op, inputs, backend, **options)
    wrong = {k: f"{v:.1e}" for k, v in found.items() if v > (loose or {}).get(k, limit)}
    assert not wrong, f"{backend} differs from the reference (tolerance {limit:.1e}): {wrong}"


def agrees(check: Callable[[], None]) -> bool:
    """Whether a comparison passes; a crash of a broken kernel counts as caught, too."""
    try:
        check()
    except Exception:  # whatever a broken kernel raises, out-of-bounds accesses included
        return False
    return True


def skewed(x: Tensor) -> Tensor:
    """The same values in a tensor that is contiguous in no axis."""
    wide = torch.empty([2 * n for n in x.shape], dtype=x.dtype, device=x.device)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def check_reference(op: Run, inputs: Mapping[str, Tensor | None], **options) -> None:
    """`torch.autograd.gradcheck` of the reference in float64; integers and None are passed on."""
    wide = widen(inputs)
    wanted = {k: v for k, v in wide.items() if v is not None and (v.is_floating_point() or v.is_complex())}
    names = list(wanted)
    fixed = {k: v for k, v in wide.items() if k not in names}

    def function(*tensors: Tensor):
        return op(**dict(zip(names, tensors, strict=True)), **fixed, **options, backend="reference")

    assert torch.autograd.gradcheck(function, [v.detach().requires_grad_() for v in wanted.values()])


@contextlib.contextmanager
def mutated(op: str, old: str, new: str, tmp_path: Path, *, files: tuple[str, ...] = ("triton",)) -> Iterator[None]:
    """Meanwhile the modules `kernels/<op>/<file>.py` are copies in which the text `old` is `new`.

    `files` in the order of import; the text must occur in one of them, exactly once. The public op must import them
    inside the function body. op may be another folder of `kernels/`, such as "common".
    """
    package = f"mixerzoo.kernels.{op}"
    names = [f"{package}.{file}" for file in files]
    sources = {file: (KERNELS / op / f"{file}.py").read_text() for file in files}
    count = sum(s.count(old) for s in sources.values())
    assert count == 1, f"{old!r} occurs {count} times in {files} of {op}"
    before = {name: sys.modules.pop(name, None) for name in names}
    folder = tmp_path / f"mutant{next(_counter)}"
    folder.mkdir()
    try:
        with registration.library_namespace(f"mixerzoo_{folder.name}"):
            for file, name in zip(files, names, strict=True):
                path = folder / f"{file}.py"  # a real file: triton.jit reads the source
                path.write_text(sources[file].replace(old, new))
                spec = importlib.util.spec_from_file_location(name, path)
                assert spec is not None
                assert spec.loader is not None
                sys.modules[name] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module

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

import ast
import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from mixerzoo.kernels.common import registration
from mixerzoo.kernels.selftest import comparison
from mixerzoo.kernels.selftest.comparison import TOLERANCE as TOLERANCE
from mixerzoo.kernels.selftest.comparison import error as error
from mixerzoo.kernels.selftest.comparison import evaluate as run
from mixerzoo.kernels.selftest.comparison import is_float
from mixerzoo.kernels.selftest.comparison import skewed as skewed
from mixerzoo.kernels.selftest.comparison import widen as widen
from torch import Tensor

KERNELS = Path(registration.__file__).parents[1]
_counter = itertools.count()
_mutations: list[Mutation] = []
_sound: set[tuple[object, ...]] = set()  # comparisons that passed without a mutation

Run = Callable[..., Tensor | tuple[Tensor, ...]]


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
    limit = tolerance or comparison.tolerance(inputs)
    found = errors(op, inputs, backend, **options)
    wrong = {k: f"{v:.1e}" for k, v in found.items() if v > (loose or {}).get(k, limit)}
    assert not wrong, f"{backend} differs from the reference (tolerance {limit:.1e}): {wrong}"


def agrees(check: Callable[[], None], *, crashes: bool = False) -> bool:
    """Whether a comparison passes. Inside of `mutated` it must pass without the mutation, which is tried first.

    Args:
        check: raises AssertionError where numbers differ.
        crashes: any other error counts as caught, too: for mutants that read out of bounds, say.
    """
    if _mutations:
        key = (check.__code__, *(c.cell_contents for c in check.__closure__ or () if _plain(c.cell_contents)))
        if key not in _sound:
            with _mutations[-1].taken_back():
                check()
            _sound.add(key)
    try:
        check()
    except AssertionError:
        return False
    except Exception:
        if crashes:
            return False
        raise
    return True


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def check_reference(op: Run, inputs: Mapping[str, Tensor | None], **options) -> None:
    """`torch.autograd.gradcheck` of the reference in float64; integers and None are passed on."""
    wide = widen(inputs)
    wanted = {k: v for k, v in wide.items() if is_float(v)}
    names = list(wanted)
    fixed = {k: v for k, v in wide.items() if k not in names}

    def function(*tensors: Tensor):
        return op(**dict(zip(names, tensors, strict=True)), **fixed, **options, backend="reference")

    assert torch.autograd.gradcheck(function, [v.detach().requires_grad_() for v in wanted.values()])


class Mutation:
    """Modules by full name that stand in the place of others, in `sys.modules` and in their packages."""

    def __init__(self) -> None:
        self.before: dict[str, ModuleType | None] = {}
        self.now: dict[str, ModuleType] = {}

    def _install(self, modules: Mapping[str, ModuleType | None]) -> None:
        for name, module in modules.items():
            package, _, last = name.rpartition(".")
            if module is None:
                sys.modules.pop(name, None)
                vars(sys.modules[package]).pop(last, None)
            else:
                sys.modules[name] = module
                setattr(sys.modules[package], last, module)

    def put(self, name: str, path: Path) -> None:
        """Import the file `path` as the module `name`."""
        self.before.setdefault(name, sys.modules.get(name))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        self.now[name] = module = importlib.util.module_from_spec(spec)
        self._install({name: module})
        spec.loader.exec_module(module)

    def undo(self) -> None:
        self._install(self.before)

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """Meanwhile all is as it was."""
        self._install(self.before)
        try:
            yield
        finally:
            self._install(self.now)


def _readers(names: Collection[str]) -> list[str]:
    """Loaded modules of `kernels/` that import one of `names` when they are loaded themselves, in order of import."""
    found: list[str] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("mixerzoo.kernels.") or name in names or not getattr(module, "__file__", None):
            continue
        if Path(str(module.__file__)).name == "__init__.py":  # the public ops import their kernels when called
            continue
        for node in ast.parse(Path(str(module.__file__)).read_text()).body:
            if isinstance(node, ast.ImportFrom):
                base = ".".join(name.split(".")[: -node.level]) if node.level else ""
                source = ".".join(part for part in (base, node.module) if part)
                if source in names or any(f"{source}.{alias.name}" in names for alias in node.names):
                    found.append(name)
                    break
    return found + (_readers({*names, *found}) if found else [])


@contextlib.contextmanager
def mutated(op: str, old: str, new: str, tmp_path: Path, *, files: tuple[str, ...] = ("triton",)) -> Iterator[None]:
    """Meanwhile the modules `kernels/<op>/<file>.py` are copies in which the text `old` is `new`.

    `files` in the order of import; the text must occur in one of them, exactly once. The public op must import them
    inside the function body; modules that import them when loaded are loaded anew. op may be another folder of
    `kernels/`, such as "common".
    """
    package = f"mixerzoo.kernels.{op}"
    sources = {f"{package}.{file}": (KERNELS / op / f"{file}.py").read_text() for file in files}
    count = sum(s.count(old) for s in sources.values())
    assert count == 1, f"{old!r} occurs {count} times in {files} of {op}"
    folder = tmp_path / f"mutant{next(_counter)}"
    folder.mkdir()
    readers = {name: str(sys.modules[name].__file__) for name in _readers(sources)}
    mutation = Mutation()
    try:
        with registration.library_namespace(f"mixerzoo_{folder.name}"):
            for name, source in sources.items():
                path = folder / f"{name.rpartition('.')[2]}.py"  # a real file: triton.jit reads the source
                path.write_text(source.replace(old, new))
                mutation.put(name, path)
            for name, file in readers.items():
                mutation.put(name, Path(file))
        _mutations.append(mutation)
        yield
    finally:
        if mutation in _mutations:
            _mutations.remove(mutation)
        mutation.undo()

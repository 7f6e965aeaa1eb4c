"""The door of every op: what its arguments must look like, which implementation runs, and where it is found.

*An op* is an object `Op("gla", __name__, ...)` in its `__init__.py`, beside the public function. The function checks
its arguments (`check_shapes`, one line for each tensor) and calls `Op(backend, *arguments)`, which chooses one of

- "triton": the kernels, `triton.py`;
- "eager": fast PyTorch calls, `eager.py`;
- "reference": the definition, `reference.py`;

and calls the function `<name>_<backend>` of that module with the same arguments.

*What an op declares* is what its Triton path takes: dtypes, sizes, whether it has a gradient. `auto` takes Triton for
CUDA and ROCm tensors that fit, on a chip that Triton compiles well for, and the eager path for everything else: what
eager computes never raises because there is a GPU. A backend that is asked for by name either runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...errors import ConfigError
from ..constant import constant_result
from ..selftest.verdicts import avoided

BACKENDS = ("auto", "triton", "eager", "reference")
OLDEST_CAPABILITY = (8, 0)  # before, Triton has no matrix instructions: products spill kilobytes a thread


class BackendError(ConfigError, RuntimeError):
    """A backend asked for by name that cannot run on these inputs, or on this machine."""


# -- what runs


@dataclass(frozen=True)
class Op:
    """An op and what its Triton path takes.

    Attributes:
        name: for messages, and of the functions `<name>_<backend>`.
        package: of the op, whose modules these functions are in.
        dtypes: of floating and complex arguments.
        limit: `limit(*arguments)`, why Triton does not take arguments of these sizes ("takes keys of up to 256, not
            300"), or None.
        yields: `yields(*arguments)`, whether `auto` takes the eager path although Triton could run, as it is faster.
        gradient: whether the Triton path has one. Where it has none and one is needed, `auto` takes the eager path.
        empty: the backend for arguments without elements, where kernels cannot be launched.
        triton, eager: the modules of these backends; `eager="reference"` where the definition is the fast path, too.
    """

    name: str
    package: str
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    limit: Callable[..., str | None] | None = None
    yields: Callable[..., bool] | None = None
    gradient: bool = True
    empty: str | None = None
    triton: str = "triton"
    eager: str = "eager"

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Choose by `backend` and call.

        Raises:
            ConfigError: unknown backend, or inputs on several devices.
            BackendError: a named backend that cannot run here.
        """
        chosen = self.choose(backend, *arguments)
        if self.empty is not None and any(t.numel() == 0 for t in _numbers(arguments)):
            chosen = self.empty
        module = {"triton": self.triton, "eager": self.eager}.get(chosen, chosen)
        _import(f"{self.package}.{module}")
        # not by its own name in `sys.modules`: the compiler of PyTorch 2.10 only sees what was there when it began
        found = getattr(sys.modules[self.package], module)
        return getattr(found, f"{self.name}_{module.partition('_')[0]}")(*arguments)

    def choose(self, backend: str, *arguments: Any) -> str:
        """Which backend runs for these arguments."""
        tensors = _tensors(arguments)
        chosen = choose_backend(self.name, backend, *tensors, obstacle=lambda: self._obstacle(arguments))
        if chosen != "triton":
            return chosen
        if not self.gradient and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if backend == "triton":
                raise BackendError(f'{self.name}: backend "triton" has no gradient; use torch.no_grad().')
            return "eager"
        if self.yields is not None and _named(backend) == "auto" and self.yields(*arguments):
            return "eager"
        return chosen

    def _obstacle(self, arguments: Sequence[Any]) -> str | None:
        """Why Triton does not take these arguments."""
        for tensor in _numbers(arguments):
            if tensor.dtype not in self.dtypes:
                allowed = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
                listed = " or ".join([", ".join(allowed[:-1]), allowed[-1]] if len(allowed) > 1 else allowed)
                return f"computes in {listed}, not {str(tensor.dtype).removeprefix('torch.')}"
        return None if self.limit is None else self.limit(*arguments)


@constant_result
def _import(module: str) -> None:
    """Only when called for: the package needs no triton, and a test can put a broken module in its place."""
    importlib.import_module(module)


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, tuple):
            found += _tensors(argument)
    return found


def _numbers(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors that are computed with: no masks, no indices."""
    return [t for t in _tensors(arguments) if t.is_floating_point() or t.is_complex()]


def at_most(largest: int, what: str, size: int) -> str | None:
    """For `Op.limit`: the reason why a size is too large, or None; `what` has {} in the place of the largest."""
    return f"takes {what.format(largest)}, not {size}" if size > largest else None


# -- which backend


@constant_result
def default_backend() -> str:
    """The value of `MIXERZOO_KERNELS`, by default `auto`.

    Raises:
        ValueError: when the variable holds something else than one of `BACKENDS`.
    """
    name = os.environ.get("MIXERZOO_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f'MIXERZOO_KERNELS="{name}" is not a backend. Allowed: {", ".join(BACKENDS)}.')
    return name


def _named(backend: str) -> str:
    return backend if backend != "auto" else default_backend()


def without_triton(backend: str) -> str:
    """For an op that has no Triton path and needs none: `MIXERZOO_KERNELS=triton` leaves it as it is."""
    return "eager" if backend == "auto" and default_backend() == "triton" else backend


def choose_backend(
    op: str,
    backend: str,
    *tensors: Tensor | None,
    available: Sequence[str] = ("triton", "eager", "reference"),
    obstacle: Callable[[], str | None] = lambda: None,
) -> str:
    """Resolve `backend` for this call to one of `available`.

    `auto` takes Triton on CUDA and ROCm tensors and the eager path elsewhere (the reference where an op has no eager
    path), for an op that failed the self-test on this card, and where plain PyTorch calls are wanted (`wants_plain`). A
    backend that is asked for by name, by argument or by `MIXERZOO_KERNELS`, either runs or raises.

    Args:
        op: name of the op, for messages.
        backend: one of `BACKENDS`; `auto` defers to `MIXERZOO_KERNELS`.
        tensors: the op's inputs; they must share one device.
        available: what the op implements.
        obstacle: says why Triton does not take these inputs, if it does not.

    Raises:
        ConfigError: unknown backend, or inputs on several devices.
        BackendError: a named backend that cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f'{op}: backend="{backend}" is not known. Allowed: {", ".join(BACKENDS)}.')
    given = [t.device for t in tensors if t is not None]
    if any(device != given[0] for device in given):
        raise ConfigError(f"{op}: inputs are on several devices: {', '.join(sorted({str(d) for d in given}))}.")
    kind, index = (given[0].type, given[0].index) if given else ("cpu", None)
    named = _named(backend)
    if named == "auto":
        best = "eager" if "eager" in available else "reference"
        if kind != "cuda" or "triton" not in available or wants_plain() or obstacle() is not None:
            return best
        why = triton_obstacle(kind, index)
        if why is not None:
            _warn_once(why)
            return best
        return best if avoided(op) else "triton"
    if named not in available:
        raise BackendError(f'{op}: backend "{named}" is not implemented. Available: {", ".join(available)}.')
    if named == "triton":
        why = f"cannot run: {why}" if (why := triton_obstacle(kind, index)) else obstacle()
        if why is not None:
            raise BackendError(f'{op}: backend "triton" {why}.')
    return named


@constant_result
def _warn_once(why: str) -> None:
    _warn_first(why)


@functools.cache
def _warn_first(why: str) -> None:
    warnings.warn(f"mixerzoo takes the slower PyTorch path: {why}.", stacklevel=2)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant_result
def triton_obstacle(device_type: str, index: int | None = None) -> str | None:
    """Why Triton cannot run on tensors of this device, or None when it can."""
    if not _installed():
        return "the package triton is not installed"
    if device_type == "cuda":  # ROCm tensors call themselves cuda, too
        return _old_chip(index)
    import triton
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    try:  # a compile-only driver may be active although no GPU is there
        driver: Any = triton.runtime.driver.active
        driver.get_current_target()
        home = driver.get_active_torch_device().type if hasattr(driver, "get_active_torch_device") else device_type
    except Exception as error:
        return f"the tensors are on {device_type} and no Triton driver is active ({error}); set TRITON_INTERPRET=1"
    if home == device_type:
        return None
    return f"the tensors are on {device_type}, its kernels run on {home}: move them there, or set TRITON_INTERPRET=1"


def _old_chip(index: int | None) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    have, need = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
    return f"{torch.cuda.get_device_name(index)} has compute capability {have}, Triton's kernels need {need}"


def is_exporting() -> bool:
    """Whether `torch.export` records. PyTorch's function of this name is always true in what 2.10 compiles."""
    return torch.compiler._is_exporting_flag


def wants_plain() -> bool:
    """Whether what is called now must consist of PyTorch's own calls, which others look into.

    So it is in `torch.export` and tracing, whose results run where nobody knows our operators, in the transforms of
    `torch.func`, and in forward-mode differentiation: PyTorch passes over an operator without tangents, silently.
    """
    return (
        is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # of `torch.autograd.forward_ad.dual_level`; -1 outside
    )


# -- what arguments look like


def check_shapes(op: str, **arguments: tuple[str, Tensor | None]) -> dict[str, int]:
    """Hold tensors against their axes; return the size of each letter.

    Args:
        op: for messages.
        arguments: by name, the axes as in "B L H K" and the tensor, None where it is not given. A letter has one size
            throughout, that of the first tensor with it; `K-1` is one less, and a number is itself. `*grid` is any
            number of axes, the same throughout.

    Raises:
        ConfigError: an axis too many or too few or of another size, or document numbers that are not integers.
    """
    sizes: dict[str, int] = {}
    grid: list[str] | None = None
    for name, (axes, tensor) in arguments.items():
        if tensor is None:
            continue
        given, letters = tensor.shape, axes.split()
        if "*" in axes:
            place = next(i for i, letter in enumerate(letters) if letter[0] == "*")
            if grid is None:
                grid = [f"{letters[place]}{i}" for i in range(len(given) - len(letters) + 1)]
            letters = [*letters[:place], *grid, *letters[place + 1 :]]
        fits, new = len(letters) == len(given), {}
        for letter, size in zip(letters, given, strict=False):
            want = _expected(letter, sizes)
            if want is None:
                new[letter] = size
            elif want != size:
                fits = False
        if not fits:
            wanted = [_expected(letter, sizes) for letter in letters]
            shape = ", ".join("any" if size is None else str(size) for size in wanted)
            shape += "," if len(letters) == 1 else ""
            raise ConfigError(
                f"{op}: {name} has shape {tuple(given)}; expected ({shape}), which is ({axes.replace(' ', ', ')})."
            )
        sizes.update(new)
        if name.endswith("document_ids") and (tensor.is_floating_point() or tensor.is_complex()):
            raise ConfigError(f"{op}: {name} must be integers, not {tensor.dtype}.")
    return sizes


def _expected(letter: str, sizes: dict[str, int]) -> int | None:
    """The size of an axis, or None where its letter is new."""
    found = sizes.get(letter)
    if found is None and letter.endswith("-1"):
        return sizes[letter[:-2]] - 1
    return int(letter) if found is None and letter.isdigit() else found


def check_divides(op: str, size: int, what: str, parts: int, of: str) -> None:
    """Raise ConfigError unless `size` of one thing can be divided into `parts` of another."""
    if parts < 1 or size % parts:
        raise ConfigError(f"{op}: the {size} {what} are not divisible into the {parts} {of}.")

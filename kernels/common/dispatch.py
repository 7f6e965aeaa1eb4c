"""Which implementation of an op runs: Triton, fast PyTorch ("eager"), or the definition ("reference")."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch

from ..selftest.verdicts import avoided

BACKENDS = ("auto", "triton", "eager", "reference")


@torch.compiler.assume_constant_result
def default_backend() -> str:
    """The value of `MIXERZOO_KERNELS`, by default `auto`.

    Raises:
        ValueError: when the variable holds something else than one of `BACKENDS`.
    """
    name = os.environ.get("MIXERZOO_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f'MIXERZOO_KERNELS="{name}" is not a backend. Allowed: {", ".join(BACKENDS)}.')
    return name


@torch.compiler.assume_constant_result
def triton_obstacle(device_type: str) -> str | None:
    """Why Triton cannot run on tensors of this device type, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda":  # ROCm tensors call themselves cuda, too
        return None
    import triton
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    try:  # a compile-only driver may be active although no GPU is there
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"the tensors are on {device_type} and no Triton driver is active ({error}); set TRITON_INTERPRET=1"
    return None


def choose_backend(
    op: str,
    backend: str,
    *tensors: torch.Tensor | None,
    available: Sequence[str] = ("triton", "eager", "reference"),
) -> str:
    """Resolve `backend` for this call to one of `available`.

    `auto` takes Triton on CUDA and ROCm tensors and the eager path elsewhere (the reference where an op has no eager
    path), and for an op that failed the self-test on this card. A backend that is asked for by name, by argument or by
    `MIXERZOO_KERNELS`, either runs or raises.

    Args:
        op: name of the op, for messages.
        backend: one of `BACKENDS`; `auto` defers to `MIXERZOO_KERNELS`.
        tensors: the op's inputs; they must share one device.
        available: what the op implements.

    Raises:
        ValueError: unknown backend, or inputs on several devices.
        RuntimeError: a named backend that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f'{op}: backend="{backend}" is not known. Allowed: {", ".join(BACKENDS)}.')
    devices = {t.device.type for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: inputs are on several devices: {', '.join(sorted(devices))}.")
    device = devices.pop() if devices else "cpu"
    named = backend if backend != "auto" else default_backend()
    if named == "auto":
        if device == "cuda" and "triton" in available and triton_obstacle(device) is None and not avoided(op):
            return "triton"
        return "eager" if "eager" in available else "reference"
    if named not in available:
        raise RuntimeError(f'{op}: backend "{named}" is not implemented. Available: {", ".join(available)}.')
    if named == "triton" and (why := triton_obstacle(device)) is not None:
        raise RuntimeError(f'{op}: backend "triton" cannot run: {why}.')
    return named

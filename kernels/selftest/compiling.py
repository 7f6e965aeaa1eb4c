"""Triton without a GPU, and autotuned kernels without timing: to build, and to compile ahead of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class _NoLauncher:
    def __init__(self, *_: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        # more shared memory than any chip: whoever builds judges it, Triton would drop the config silently
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1 << 20  # module, function, registers, spills, most threads of a program

    def unload_module(self, module: int) -> None:
        pass


class CompileOnlyDriver:
    """As much of a Triton driver as compiling needs. Launching a kernel through it does nothing.

    Args:
        arch: `"sm_90"`, `"gfx942"` ...
    """

    launcher_cls = _NoLauncher
    utils = _Utils()

    def __init__(self, arch: str):
        from triton.backends.compiler import GPUTarget

        if arch.startswith("gfx"):
            self.target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        else:
            self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(arch: str) -> None:
    """From now on this process compiles for `arch` whatever it would launch, and can launch no kernel ever after."""
    from triton.runtime import driver

    active: Any = CompileOnlyDriver(arch)  # it only looks like a driver
    driver.set_active(active)


def this_arch() -> str:
    """The architecture of the current GPU, as `CompileOnlyDriver` takes it."""
    properties = torch.cuda.get_device_properties()
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextlib.contextmanager
def pinned(index: int) -> Iterator[dict[str, int]]:
    """Meanwhile every autotuned kernel takes the configuration at `index` of its list (modulo its length), untimed.

    Yields the lengths of the lists that were met, by kernel.
    """
    from triton.runtime import autotuner

    lengths: dict[str, int] = {}
    original = autotuner.Autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = list(self.prune_configs(kwargs))
        lengths[self.fn.__name__] = len(configs)
        self.best_config = configs[index % len(configs)]
        try:
            return self.fn.run(*args, **{**kwargs, **self.best_config.all_kwargs()})
        finally:
            self.nargs = None

    autotuner.Autotuner.run = run
    try:
        yield lengths
    finally:
        autotuner.Autotuner.run = original

"""Modules that cannot fit the machine's memory are refused before that memory is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from ..errors import OptionError


def machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_shape(*size: Any, **_: Any) -> int:
    return math.prod(size[0] if size and isinstance(size[0], (tuple, list)) else size)


def _of_range(start: float, end: float | None = None, step: float = 1, **_: Any) -> int:
    return int((start if end is None else end - start) / step)


_COUNTS: dict[Callable[..., Any], Callable[..., int]] = {
    **dict.fromkeys((torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn), _of_shape),
    torch.full: lambda size, *_, **__: _of_shape(size),
    torch.arange: _of_range,
    torch.linspace: lambda start, end, steps, **_: steps,
    torch.eye: lambda n, m=None, **_: n * (n if m is None else m),
}


class _Watch(TorchFunctionMode):
    """Refuses tensors that would be larger than the memory, and adds up parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.held = machine_memory(), 0

    def need(self, size: int) -> None:
        """Refuse that many bytes where they are too many."""
        if size > self.limit:
            raise OptionError(
                "",
                f"its parameters need {size / 1e9:,.1f} GB and more, but the machine has {self.limit / 1e9:,.1f} GB; "
                "memory_check=false lets it pass.",
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = _COUNTS.get(func)
        if count is not None and torch.get_default_device().type != "meta":
            self.need(4 * count(*args, **kwargs))
        return func(*args, **kwargs)

    def add(self, module: nn.Module, name: str, value: Any) -> None:
        """A parameter or buffer that a module has got."""
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            self.held += value.numel() * value.element_size()
            self.need(self.held)


_WATCHED: ContextVar[bool] = ContextVar("watched", default=False)


@contextmanager
def fits_memory(check: bool = True) -> Iterator[None]:
    """What is built inside is refused where its parameters alone exceed the machine's memory.

    Args:
        check: false lets everything pass, also in contexts inside of this one.

    Raises:
        OptionError: parameters and buffers larger than the memory, one of them or all together; of the device "meta"
            none count.
    """
    if _WATCHED.get():
        yield
        return
    token = _WATCHED.set(True)
    hooks: list[Any] = []
    try:
        if not check:
            yield
            return
        watch = _Watch()
        hooks += [register_module_parameter_registration_hook(watch.add)]
        hooks += [register_module_buffer_registration_hook(watch.add)]
        with watch:
            yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise OptionError("", f"there is no memory for it: {str(error).splitlines()[0][-120:]}") from error
    finally:
        for hook in hooks:
            hook.remove()
        _WATCHED.reset(token)

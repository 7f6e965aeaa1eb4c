"""What the compiler may take as known: `torch.compiler.assume_constant_result`, without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """Mark a function whose result `torch.compile` computes once, at tracing, and takes as a constant from then on.

    PyTorch's own decorator does no more than this, but imports `torch._dynamo` for it, which doubles the time that
    `import mixerzoo` takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

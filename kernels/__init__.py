"""Ops on tensors, each with a reference, a fast PyTorch path and a Triton path. See `docs/kernels.md`.

What the folder of an op has in its `__all__` is here, too; type checkers read it in `__init__.pyi`.
"""

from .common.dispatch import BACKENDS, choose_backend, default_backend
from .common.public import public

globals().update(public())

__all__ = ["BACKENDS", "choose_backend", "default_backend"]
__all__ += list(public())  # pyright: ignore[reportUnsupportedDunderAll]

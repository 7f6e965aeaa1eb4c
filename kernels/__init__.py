"""Ops on tensors, each with a reference, a fast PyTorch path and a Triton path. See `docs/kernels.md`."""

from .dispatch import BACKENDS, choose_backend, default_backend

__all__ = ["BACKENDS", "choose_backend", "default_backend"]

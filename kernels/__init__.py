"""Ops on tensors, each with a reference, a fast PyTorch path and a Triton path. See `docs/kernels.md`."""

from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .dispatch import BACKENDS, choose_backend, default_backend
from .selective_scan import selective_scan, selective_scan_step

__all__ = [
    "BACKENDS",
    "causal_conv1d",
    "causal_conv1d_step",
    "choose_backend",
    "default_backend",
    "selective_scan",
    "selective_scan_step",
]

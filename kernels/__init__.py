"""Ops on tensors, each with a reference, a fast PyTorch path and a Triton path. See `docs/kernels.md`."""

from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .delta_rule import delta_rule, delta_rule_step
from .dispatch import BACKENDS, choose_backend, default_backend
from .gla import gla, gla_step
from .selective_scan import selective_scan, selective_scan_step
from .ssd import ssd, ssd_step

__all__ = [
    "BACKENDS",
    "causal_conv1d",
    "causal_conv1d_step",
    "choose_backend",
    "default_backend",
    "delta_rule",
    "delta_rule_step",
    "gla",
    "gla_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]

"""Ops on tensors, each with a reference, a fast PyTorch path and a Triton path. See `docs/kernels.md`."""

from .block_sparse_attention import Blocks, block_sparse_attention, blocks_of_lists, blocks_of_mask
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .common.dispatch import BACKENDS, choose_backend, default_backend
from .delta_rule import delta_rule, delta_rule_step
from .gla import gla, gla_step
from .pool_mix import pool_mix
from .segment_pool import segment_pool
from .selective_scan import selective_scan, selective_scan_step
from .shift import shift
from .spectral_filter import spectral_filter
from .spectral_mlp import spectral_mlp
from .ssd import ssd, ssd_step
from .token_mlp import token_mlp

__all__ = [
    "BACKENDS",
    "Blocks",
    "block_sparse_attention",
    "blocks_of_lists",
    "blocks_of_mask",
    "causal_conv1d",
    "causal_conv1d_step",
    "choose_backend",
    "default_backend",
    "delta_rule",
    "delta_rule_step",
    "gla",
    "gla_step",
    "pool_mix",
    "segment_pool",
    "selective_scan",
    "selective_scan_step",
    "shift",
    "spectral_filter",
    "spectral_mlp",
    "ssd",
    "ssd_step",
    "token_mlp",
]

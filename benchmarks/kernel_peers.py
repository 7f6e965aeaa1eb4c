"""What the ops are timed beside: functions of other libraries for the same work, on the arguments of our op.

A library that is missing raises ImportError when its function is called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mixerzoo.kernels.block_sparse_attention.blocks import mask_of_blocks
from torch import Tensor

Arguments = Mapping[str, Any]
Peer = Callable[[Arguments], Any]


def _of(module: str, function: str) -> Callable[..., Any]:
    """A function of a library that may not be there."""
    return getattr(importlib.import_module(module), function)


def _mamba_scan(x: Arguments) -> Any:
    # channels first, which is that library's layout: part of its cost
    u, delta, z = (x[name].mT.contiguous() for name in ("u", "delta", "z"))
    B, C = (x[name].permute(0, 2, 3, 1).contiguous() for name in ("B", "C"))
    scan = _of("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    return scan(u, delta, x["A"], B, C, x["D"], z, x["delta_bias"], delta_softplus=True)


def _mamba_step(x: Arguments) -> Any:
    update = _of("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    options = {"z": x["z_t"], "dt_bias": x["delta_bias"], "dt_softplus": True}
    return update(x["state"], x["u_t"], x["delta_t"], x["A"], x["B_t"][:, 0], x["C_t"][:, 0], x["D"], **options)


def _mamba_ssd(x: Arguments) -> Any:
    scan = _of("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    # its decay is dt * A with the rate dt of the values: other numbers, the same work
    rates = -torch.ones(x["v"].shape[2], device=x["v"].device)
    return scan(x["v"], x["beta"], rates, x["k"], x["q"], chunk_size=256)


def _fla_simple_gla(x: Arguments) -> Any:
    q, k = (x[name].expand(-1, -1, x["v"].shape[2], -1) for name in ("q", "k"))
    v = (x["v"] * x["beta"][..., None]).to(x["v"].dtype)
    return _of("fla.ops.simple_gla", "chunk_simple_gla")(q, k, v, x["g"])[0]


def _fla_gla(x: Arguments) -> Any:
    return _of("fla.ops.gla", "chunk_gla")(x["q"], x["k"], x["v"], x["g"])[0]


def _fla_delta(x: Arguments) -> Any:
    return _of("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])[
        0
    ]


def _conv(x: Arguments) -> Any:
    return _of("causal_conv1d", "causal_conv1d_fn")(x["x"].mT, x["weight"], x["bias"], activation="silu").mT


def _conv_step(x: Arguments) -> Any:
    state = x["state"].mT.contiguous()  # channels first, in place; it is small
    return _of("causal_conv1d", "causal_conv1d_update")(x["x_t"], state, x["weight"], x["bias"], activation="silu")


def _torch_conv(x: Arguments) -> Any:
    weight = x["weight"]
    y = F.conv1d(x["x"].mT, weight[:, None], x["bias"], padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(y[..., : x["x"].shape[1]]).mT


def _torch_pool(x: Arguments) -> Any:
    first = x["x"].permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(first, x["pool_size"], 1, x["pool_size"] // 2, count_include_pad=False)
    return (pooled - first).permute(0, 2, 3, 1)


def _torch_token_mlp(x: Arguments) -> Any:
    return F.linear(F.gelu(F.linear(x["x"].mT, x["w1"], x["b1"])), x["w2"], x["b2"]).mT


def _torch_filter(x: Arguments) -> Any:
    return torch.mul(x["x"], x["w"])


def _torch_dense(x: Arguments) -> Any:
    """All blocks: what leaving some out must beat."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@functools.cache
def _flex() -> Callable[..., Any]:
    return torch.compile(_of("torch.nn.attention.flex_attention", "flex_attention"))


_block_masks: dict[int, Any] = {}


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _block_mask(x: Arguments) -> Any:
    """Our lists as FlexAttention wants them: whole blocks apart from those on the diagonal; made once."""
    blocks = x["blocks"]
    if (found := _block_masks.get(id(blocks))) is not None:
        return found
    tiles = blocks.offsets.shape[2] - 1
    mask = mask_of_blocks(blocks, tiles)
    diagonal = torch.eye(tiles, dtype=torch.bool, device=mask.device)

    def lists(active: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(active.int(), dim=-1, descending=True, stable=True)
        return active.sum(-1, dtype=torch.int32), order.int()

    make = _of("torch.nn.attention.flex_attention", "BlockMask").from_kv_blocks
    found = make(*lists(mask & diagonal), *lists(mask & ~diagonal), BLOCK_SIZE=blocks.block_q, mask_mod=_causal)
    _block_masks[id(blocks)] = found
    return found


def _flex_attention(x: Arguments) -> Any:
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    return _flex()(q, k, v, block_mask=_block_mask(x), enable_gqa=True).transpose(1, 2)


# by public function, by name; "torch" ones run anywhere
PEERS: dict[str, dict[str, Peer]] = {
    "selective_scan": {"mamba_ssm": _mamba_scan},
    "selective_scan_step": {"mamba_ssm": _mamba_step},
    "ssd": {"fla simple_gla": _fla_simple_gla, "mamba_ssm": _mamba_ssd},
    "gla": {"fla": _fla_gla},
    "delta_rule": {"fla": _fla_delta},
    "causal_conv1d": {"torch conv1d": _torch_conv, "causal_conv1d": _conv},
    "causal_conv1d_step": {"causal_conv1d": _conv_step},
    "pool_mix": {"torch avg_pool2d": _torch_pool},
    "token_mlp": {"torch linear": _torch_token_mlp},
    "spectral_filter": {"torch multiply": _torch_filter},
    "block_sparse_attention": {"torch SDPA, all blocks": _torch_dense, "FlexAttention": _flex_attention},
}

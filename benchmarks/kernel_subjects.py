"""What `benchmarks/kernels.py` times: every op at the size of its cost in `find_rooflines()`, and its peers.

B batch, L tokens, D channels, N states, H heads, G groups, K and V head sizes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from mixerzoo import kernels
from torch import Tensor

HALF, FULL, COMPLEX = torch.bfloat16, torch.float32, torch.complex64


@dataclass
class Subject:
    """An op at one size.

    Attributes:
        op: name in `mixerzoo.kernels`.
        size: the model; how the size of its costs in `find_rooflines()` begins.
        inputs: by device, tensors that are differentiated (all but for steps).
        ours: the op as a function of the inputs and a backend.
        peers: others, as functions of the inputs; a missing library raises ImportError when called.
        like: places in `inputs` of the tensors that the outputs have the sizes of.
        backward: whether gradients are timed, too.
    """

    op: str
    size: str
    inputs: Callable[[str], list[Tensor]]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    like: tuple[int, ...] = (0,)
    backward: bool = True


def _normal(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = HALF) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _decay(device: str, *shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return -torch.rand(shape, device=device, dtype=dtype)


def _of(module: str, function: str) -> Callable[..., Any]:
    """A function of a library that may not be there."""
    return getattr(importlib.import_module(module), function)


# -- inputs


def _scan_inputs(device: str, B: int, L: int, D: int, N: int, G: int) -> list[Tensor]:
    u, delta, b, c, z = _normal(device, (B, L, D), (B, L, D), (B, L, G, N), (B, L, G, N), (B, L, D))
    return [u, delta, _decay(device, D, N), b, c, z, *_normal(device, (D,), (D,), dtype=FULL)]


def _scan_step_inputs(device: str) -> list[Tensor]:
    B, D, N = 64, 1536, 16
    u, delta, b, c, z = _normal(device, (B, D), (B, D), (B, 1, N), (B, 1, N), (B, D))
    skip, bias, state = _normal(device, (D,), (D,), (B, D, N), dtype=FULL)
    return [u, delta, _decay(device, D, N), b, c, z, skip, bias, state]


def _heads(device: str, *lead: int, H: int, K: int, V: int, G: int | None = None) -> list[Tensor]:
    """q, k (*lead, G, K), v (*lead, H, V); G = H by default."""
    rows = G or H
    q, k, v = _normal(device, (*lead, rows, K), (*lead, rows, K), (*lead, H, V))
    return [q, F.normalize(k, dim=-1), v]


def _ssd_inputs(device: str, *lead: int) -> list[Tensor]:
    """Mamba-2 130M: q, k, v, g, beta."""
    gates = [_decay(device, *lead, 24), torch.rand(*lead, 24, device=device)]
    return [*_heads(device, *lead, H=24, K=128, V=64, G=1), *gates]


def _gla_inputs(device: str, *lead: int) -> list[Tensor]:
    """GLA 340M: q, k, v, g."""
    return [*_heads(device, *lead, H=4, K=128, V=256), _decay(device, *lead, 4, 128, dtype=HALF)]


def _delta_inputs(device: str, *lead: int) -> list[Tensor]:
    """Gated DeltaNet 340M: q, k, v, beta, g."""
    gates = [torch.rand(*lead, 8, device=device), _decay(device, *lead, 8)]
    return [*_heads(device, *lead, H=8, K=128, V=128), *gates]


def _spectral_inputs(device: str) -> list[Tensor]:
    weights = _normal(device, (2, 8, 96, 96), (2, 8, 96), (2, 8, 96, 96), (2, 8, 96), dtype=FULL)
    return [*_normal(device, (8, 64, 33, 768), dtype=COMPLEX), *weights]


@functools.cache
def _some_blocks(device: torch.device, tiles: int, heads: int) -> kernels.Blocks:
    """A quarter of the causal blocks of 128, that of the tile among them."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(1, heads, tiles, tiles, generator=generator)
    causal = torch.ones(tiles, tiles, dtype=torch.bool).tril()
    score = score.masked_fill(~causal, -1) + 2 * torch.eye(tiles)
    count = (torch.arange(1, tiles + 1)[:, None] / 4).ceil()
    mask = (score.argsort(-1, descending=True).argsort(-1) < count) & causal
    return kernels.blocks_of_mask(mask.to(device), 128, 128)


# -- ours, where it takes more than a lambda, and peers


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor, bias: Tensor, backend: str
) -> Any:
    return kernels.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, backend=backend)


def _scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor, bias: Tensor, state: Tensor,
    backend: str,
) -> Any:  # fmt: skip
    return kernels.selective_scan_step(
        u, delta, A, B, C, D, state, z_t=z, delta_bias=bias, delta_softplus=True, backend=backend
    )


def _mamba_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    first = [x.mT.contiguous() for x in (u, delta)]  # channels first, which is that library's layout: part of its cost
    B, C = (x.permute(0, 2, 3, 1).contiguous() for x in (B, C))
    scan = _of("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    return scan(*first, A, B, C, D, z.mT.contiguous(), bias, delta_softplus=True)


def _mamba_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor, bias: Tensor, state: Tensor
) -> Tensor:
    update = _of("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    return update(state, u, delta, A, B[:, 0], C[:, 0], D, z=z, dt_bias=bias, dt_softplus=True)  # state in place


def _mamba_ssd(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    scan = _of("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    # its decay is dt * A with the rate dt of the values: other numbers, the same work
    return scan(v, beta, -torch.ones(v.shape[2], device=v.device), k, q, chunk_size=256)


def _fla_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
    return _of("fla.ops.simple_gla", "chunk_simple_gla")(q, k, (v * beta[..., None]).to(v.dtype), g)[0]


def _fla_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _of("fla.ops.gla", "chunk_gla")(q, k, v, g)[0]


def _fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    return _of("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")(q, k, v, g=g, beta=beta)[0]


def _conv_peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _of("causal_conv1d", "causal_conv1d_fn")(x.mT, weight, bias, activation="silu").mT


def _conv_step_peer(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    state = state.mT.contiguous()  # channels first, in place; it is small
    return _of("causal_conv1d", "causal_conv1d_update")(x, state, weight, bias, activation="silu")


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).mT


def _torch_pool(x: Tensor) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    return (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x).permute(0, 2, 3, 1)


def _torch_token_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x.mT, w1, b1)), w2, b2).mT


def _torch_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _sparse_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Any:
    blocks = _some_blocks(q.device, q.shape[1] // 128, k.shape[2])
    return kernels.block_sparse_attention(q, k, v, blocks, causal=True, backend=backend)


def _scans() -> list[Subject]:
    def scan(B: int, L: int, D: int, N: int, G: int) -> Callable[[str], list[Tensor]]:
        return lambda device: _scan_inputs(device, B, L, D, N, G)

    mamba = {"mamba_ssm": _mamba_scan}
    return [
        Subject("selective_scan", "Mamba-130M", scan(8, 2048, 1536, 16, 1), _scan, mamba),
        Subject("selective_scan", "Mamba-2.8B", scan(8, 2048, 5120, 16, 1), _scan, mamba),
        Subject("selective_scan", "VMamba-T", scan(128, 3136, 768, 1, 4), _scan, mamba),
        Subject(
            "selective_scan_step", "Mamba-130M", _scan_step_inputs, _scan_step, {"mamba_ssm": _mamba_step},
            like=(0, 8), backward=False,
        ),
        Subject(
            "ssd", "Mamba-2", lambda device: _ssd_inputs(device, 8, 2048),
            lambda q, k, v, g, beta, backend: kernels.ssd(q, k, v, g, beta, backend=backend),
            {"mamba_ssm": _mamba_ssd, "fla simple_gla": _fla_simple_gla}, like=(2,),
        ),
        Subject(
            "ssd_step", "Mamba-2",
            lambda device: [*_ssd_inputs(device, 64), *_normal(device, (64, 24, 128, 64), dtype=FULL)],
            lambda q, k, v, g, beta, state, backend: kernels.ssd_step(q, k, v, g, state, beta_t=beta, backend=backend),
            like=(2, 5), backward=False,
        ),
        Subject(
            "gla", "GLA", lambda device: _gla_inputs(device, 8, 2048),
            lambda q, k, v, g, backend: kernels.gla(q, k, v, g, backend=backend), {"fla gla": _fla_gla}, like=(2,),
        ),
        Subject(
            "gla_step", "GLA",
            lambda device: [*_gla_inputs(device, 64), *_normal(device, (64, 4, 128, 256), dtype=FULL)],
            lambda q, k, v, g, state, backend: kernels.gla_step(q, k, v, g, state, backend=backend),
            like=(2, 4), backward=False,
        ),
        Subject(
            "delta_rule", "Gated DeltaNet", lambda device: _delta_inputs(device, 8, 2048),
            lambda q, k, v, beta, g, backend: kernels.delta_rule(q, k, v, beta, g, backend=backend),
            {"fla gated_delta_rule": _fla_delta}, like=(2,),
        ),
        Subject(
            "delta_rule_step", "Gated DeltaNet",
            lambda device: [*_delta_inputs(device, 64), *_normal(device, (64, 8, 128, 128), dtype=FULL)],
            lambda q, k, v, beta, g, state, backend: kernels.delta_rule_step(q, k, v, beta, g, state, backend=backend),
            like=(2, 5), backward=False,
        ),
    ]  # fmt: skip


def _local() -> list[Subject]:
    return [
        Subject(
            "causal_conv1d", "Mamba-130M", lambda device: _normal(device, (8, 2048, 1536), (1536, 4), (1536,)),
            lambda x, w, b, backend: kernels.causal_conv1d(x, w, b, activation="silu", backend=backend),
            {"causal_conv1d": _conv_peer, "torch conv1d": _torch_conv},
        ),
        Subject(
            "causal_conv1d_step", "Mamba-130M",
            lambda device: _normal(device, (64, 1536), (1536, 4), (1536,), (64, 3, 1536)),
            lambda x, w, b, s, backend: kernels.causal_conv1d_step(x, w, b, s, activation="silu", backend=backend),
            {"causal_conv1d": _conv_step_peer}, like=(0, 3), backward=False,
        ),
        Subject(
            "pool_mix", "PoolFormer-S12 stage 1", lambda device: _normal(device, (64, 56, 56, 64)),
            lambda x, backend: kernels.pool_mix(x, backend=backend), {"torch avg_pool2d": _torch_pool},
        ),
        Subject(
            "segment_pool", "PoNet-base", lambda device: _normal(device, (32, 512, 768), (32, 512, 768)),
            lambda s, x, backend: kernels.segment_pool(s, x, segment_length=16, backend=backend), like=(0, 1),
        ),
        Subject(
            "shift", "S2-MLP", lambda device: _normal(device, (64, 14, 14, 384)),
            lambda x, backend: kernels.shift(x, [(0, 1), (0, -1), (1, 0), (-1, 0)], backend=backend),
        ),
    ]  # fmt: skip


def _global() -> list[Subject]:
    return [
        Subject(
            "token_mlp", "Mixer-B/16",
            lambda device: _normal(device, (64, 196, 768), (384, 196), (384,), (196, 384), (196,)),
            lambda x, w1, b1, w2, b2, backend: kernels.token_mlp(x, w1, b1, w2, b2, backend=backend),
            {"torch linear": _torch_token_mlp},
        ),
        Subject(
            "spectral_mlp", "AFNO-B", _spectral_inputs,
            lambda x, w1, b1, w2, b2, backend: kernels.spectral_mlp(x, w1, b1, w2, b2, backend=backend),
        ),
        Subject(
            "spectral_filter", "GFNet-B",
            lambda device: _normal(device, (64, 14, 8, 512), (14, 8, 512), dtype=COMPLEX),
            lambda x, w, backend: kernels.spectral_filter(x, w, backend=backend), {"torch multiply": torch.mul},
        ),
        Subject(
            "block_sparse_attention", "Llama-3-8B layer",
            lambda device: _normal(device, (1, 32768, 32, 128), (1, 32768, 8, 128), (1, 32768, 8, 128)),
            _sparse_attention, {"torch attention, dense": _torch_dense},
        ),
    ]  # fmt: skip


def subjects() -> list[Subject]:
    """What is timed."""
    return [*_scans(), *_local(), *_global()]

"""Time every Triton kernel on a GPU, against its floor and its peers.

    python -m mixerzoo.benchmarks.kernels [--only OP ...] [--json FILE]

Each op runs at the size of a real model, forward, and forward with backward. Printed are the median time, the floor
(`mixerzoo.kernels.costs`: what the compulsory bytes and flops take at the data sheet's rates) and the same for the
peers that are installed: flash-linear-attention, mamba_ssm and causal_conv1d, and PyTorch (our eager path, or the
library's function). Runs are interleaved, and the cache is flushed in between. Without a GPU it exits with 2.

B batch, L tokens, D channels, N states, H heads, K and V head sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from mixerzoo import kernels
from mixerzoo.errors import ConfigError, unknown
from mixerzoo.kernels.costs import GPUS, Cost
from mixerzoo.kernels.discovery import find_rooflines
from torch import Tensor


@dataclass
class Subject:
    """An op at one size.

    Attributes:
        op: name in `mixerzoo.kernels`.
        size: the model; how the size of its costs in `find_rooflines()` begins.
        inputs: tensors that are differentiated.
        ours: the op as a function of the inputs and a backend.
        peers: others, as functions of the inputs; a missing library raises ImportError when called.
    """

    op: str
    size: str
    inputs: Callable[[], list[Tensor]]
    ours: Callable[..., Tensor]
    peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def _scan_inputs() -> list[Tensor]:
    B, L, D, N = 8, 2048, 1536, 16
    A = -torch.rand(D, N, device="cuda")
    vectors = [_normal(D, dtype=torch.float32) for _ in range(2)]
    return [_normal(B, L, D), _normal(B, L, D), A, _normal(B, L, 1, N), _normal(B, L, 1, N), _normal(B, L, D), *vectors]


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor, bias: Tensor, backend: str):
    return kernels.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, backend=backend)


def _mamba_ssm_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor, bias: Tensor):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    first = [x.mT.contiguous() for x in (u, delta)]  # channels first, which is that library's layout: part of its cost
    B, C = (x.permute(0, 2, 3, 1).contiguous() for x in (B, C))
    return selective_scan_fn(*first, A, B, C, D, z.mT.contiguous(), bias, delta_softplus=True)


def _conv_peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).mT


def _heads() -> list[Tensor]:
    """q, k, v (B, L, H, 64) and the log decay of each head (B, L, H)."""
    q, k, v = (_normal(8, 2048, 12, 64) for _ in range(3))
    return [q, F.normalize(k, dim=-1), v, F.logsigmoid(_normal(8, 2048, 12, dtype=torch.float32))]


def _fla(name: str) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        import importlib

        module, function = name.rsplit(".", 1)
        return getattr(importlib.import_module(f"fla.ops.{module}"), function)(*tensors)[0]

    return run


def _gla_inputs() -> list[Tensor]:
    q, k, v, _ = _heads()
    return [q, k, v, F.logsigmoid(_normal(8, 2048, 12, 64, dtype=torch.float32))]


def _delta_inputs() -> list[Tensor]:
    q, k, v, g = _heads()
    return [q, k, v, torch.sigmoid(_normal(8, 2048, 12)), g]


def _fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]


def _torch_pool(x: Tensor) -> Tensor:
    return (F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False) - x.permute(0, 3, 1, 2)).permute(
        0, 2, 3, 1
    )


def _torch_token_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x.mT, w1, b1)), w2, b2).mT


def subjects() -> list[Subject]:
    """What is timed."""
    f32 = torch.float32
    complex_ = torch.complex64
    return [
        Subject("selective_scan", "Mamba-130M", _scan_inputs, _scan, {"mamba_ssm": _mamba_ssm_scan}),
        Subject(
            "causal_conv1d",
            "Mamba-130M",
            lambda: [_normal(8, 2048, 1536), _normal(1536, 4), _normal(1536)],
            lambda x, w, b, backend: kernels.causal_conv1d(x, w, b, activation="silu", backend=backend),
            {"causal_conv1d": _conv_peer, "torch conv1d": _torch_conv},
        ),
        Subject(
            "ssd",
            "Mamba-2",
            _heads,
            lambda q, k, v, g, backend: kernels.ssd(q, k, v, g, backend=backend),
            {"fla simple_gla": _fla("simple_gla.chunk_simple_gla")},
        ),
        Subject(
            "gla",
            "GLA",
            _gla_inputs,
            lambda q, k, v, g, backend: kernels.gla(q, k, v, g, backend=backend),
            {"fla gla": _fla("gla.chunk_gla")},
        ),
        Subject(
            "delta_rule",
            "Gated DeltaNet",
            _delta_inputs,
            lambda q, k, v, beta, g, backend: kernels.delta_rule(q, k, v, beta, g, backend=backend),
            {"fla gated_delta_rule": _fla_delta},
        ),
        Subject(
            "pool_mix",
            "PoolFormer-S12 stage 1",
            lambda: [_normal(64, 56, 56, 64)],
            lambda x, backend: kernels.pool_mix(x, backend=backend),
            {"torch avg_pool2d": _torch_pool},
        ),
        Subject(
            "token_mlp",
            "Mixer-B/16",
            lambda: [_normal(64, 196, 768), _normal(384, 196), _normal(384), _normal(196, 384), _normal(196)],
            lambda x, w1, b1, w2, b2, backend: kernels.token_mlp(x, w1, b1, w2, b2, backend=backend),
            {"torch linear": _torch_token_mlp},
        ),
        Subject(
            "spectral_mlp",
            "AFNO-B",
            lambda: [
                _normal(8, 64, 33, 768, dtype=complex_),
                _normal(2, 8, 96, 96, dtype=f32),
                _normal(2, 8, 96, dtype=f32),
                _normal(2, 8, 96, 96, dtype=f32),
                _normal(2, 8, 96, dtype=f32),
            ],
            lambda x, w1, b1, w2, b2, backend: kernels.spectral_mlp(x, w1, b1, w2, b2, backend=backend),
        ),
        Subject(
            "spectral_filter",
            "GFNet-B",
            lambda: [_normal(64, 14, 8, 512, dtype=complex_), _normal(14, 8, 512, dtype=complex_)],
            lambda x, w, backend: kernels.spectral_filter(x, w, backend=backend),
            {"torch multiply": torch.mul},
        ),
    ]


def _step(function: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors]
    cotangent = torch.randn_like(function(*leaves).detach())
    return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent, allow_unused=True)


def _milliseconds(runs: dict[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """Median time of each on the GPU, by events, in rotating order, the second-level cache overwritten in between."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 3):  # three to warm up, in which Triton autotunes
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            runs[name]()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def _floor(subject: Subject, backward: bool, costs: list[Cost], gpu: str | None) -> tuple[float, str] | None:
    label = f"{subject.op} {'with backward' if backward else 'forward'}"
    found = [c for c in costs if c.label == label and c.size.startswith(subject.size)]
    if not found or gpu is None:
        return None
    seconds, bound = found[0].floor(gpu)
    return seconds * 1e3, bound


def measure(subject: Subject, backward: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds by implementation, and why others are missing."""
    tensors = subject.inputs()
    candidates: dict[str, Callable[..., Tensor]] = {
        f"mixerzoo {backend}": lambda *t, backend=backend: subject.ours(*t, backend=backend)
        for backend in ("triton", "eager")
    }
    runs, missing = {}, {}
    for name, function in (candidates | subject.peers).items():
        try:
            runs[name] = _step(function, tensors, backward)
            runs[name]()
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            runs.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return _milliseconds(runs), missing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Time every Triton kernel against its floor and its peers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    names = [s.op for s in subjects()]
    try:
        for name in options.only:
            if name not in names:
                raise unknown("--only", name, names)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py times GPU kernels and found no GPU (torch.cuda.is_available() is False). "
            "What can be known without one is in docs/kernels.md.",
            file=sys.stderr,
        )
        return 2
    device = torch.cuda.get_device_name()
    gpu = next((name for name in GPUS if name in device), None)
    print(f"{device}; torch {torch.__version__}; floors: {gpu or 'none, this GPU is not in mixerzoo.kernels.costs'}")
    costs, rows = find_rooflines(), []
    for subject in subjects():
        if options.only and subject.op not in options.only:
            continue
        for backward in (False, True):
            times, missing = measure(subject, backward)
            floor = _floor(subject, backward, costs, gpu)
            print(f"== {subject.op}, {subject.size}, {'forward and backward' if backward else 'forward'}")
            if floor:
                print(f"   {'floor':28} {floor[0]:9.3f} ms  ({floor[1]})")
            for name, ms in times.items():
                print(f"   {name:28} {ms:9.3f} ms" + (f"  {ms / floor[0]:5.1f} x floor" if floor else ""))
            for name, why in missing.items():
                print(f"   {name:28} {why}")
            rows.append({"op": subject.op, "backward": backward, "floor": floor, "ms": times, "missing": missing})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

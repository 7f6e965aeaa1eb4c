"""Every token mixer for images at one width: time, memory, FLOPs, beside timm's module where there is one.

    python -m mixerzoo.benchmarks.mixers [--mixers resmlp gmlp ...] [--dim 64] [--batch 4] [--grids 14x14 56x56 ...]

Times are of `x + mix(x)`, since a layout that costs nothing inside of a mixer may cost at its residual: one forward
pass, and a forward and backward pass, interleaved with timm's in one process. A ratio is timm's time over ours, the
median over rounds with its quartiles; above 1 ours is faster. Memory is what a forward pass keeps for backward.
Channels-last maps `(B, H, W, C)` for ours; timm gets its own layout, `(B, N, C)` or `(B, C, H, W)`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from mixerzoo.benchmarks.interleaved import interleave, ratio
from mixerzoo.mixers import Mixer, create_mixer, list_mixers, mixer_class
from mixerzoo.training.cost import count_parameters, measure_activation_bytes, measure_flops
from timm.layers import GatedMlp, Mlp
from timm.models import metaformer, mlp_mixer, vision_transformer
from torch import Tensor, nn

GRIDS = ("14x14", "28x28", "56x56", "64x32")


class OnTokens(nn.Module):
    """A module over the tokens of a transposed sequence, as timm's blocks call it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def _gmlp(dim: int, tokens: int) -> nn.Module:
    gate: Any = partial(mlp_mixer.SpatialGatingUnit, seq_len=tokens)
    return GatedMlp(dim, 4 * dim, gate_layer=gate)


# mixer -> timm's module for a width and a number of tokens, and whether it takes maps rather than sequences
PEERS: dict[str, tuple[Callable[[int, int], nn.Module], bool]] = {
    "attention": (lambda dim, tokens: vision_transformer.Attention(dim, num_heads=max(1, dim // 32)), False),
    "conv": (lambda dim, tokens: metaformer.SepConv(dim), True),
    "gmlp": (_gmlp, False),
    "mlp_mixer": (lambda dim, tokens: OnTokens(Mlp(tokens, dim // 2)), False),
    "pooling": (lambda dim, tokens: metaformer.Pooling(), True),
    "resmlp": (lambda dim, tokens: OnTokens(nn.Linear(tokens, tokens)), False),
}


def forward_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """An inference run."""

    def run() -> Tensor:
        with torch.inference_mode():
            return x + module(x)

    return run


def both_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward and backward pass, down to the input; the gradient of the output is dense, as that of a model is."""
    x, gradient = x.clone().requires_grad_(), torch.randn_like(x)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        (x + module(x)).backward(gradient)

    return run


def build(name: str, dim: int, grid: tuple[int, int]) -> Mixer:
    """The mixer with its defaults."""
    return create_mixer(name, dim, grid=grid, causal=mixer_class(name).causal == "always")


def measure(name: str, dim: int, grid: tuple[int, int], batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """A row of the table."""
    torch.manual_seed(0)
    mixer = build(name, dim, grid)
    x = torch.randn(batch, *grid, dim)
    modules: dict[str, tuple[nn.Module, Tensor]] = {"ours": (mixer, x)}
    if name in PEERS:
        make, on_maps = PEERS[name]
        theirs = x.permute(0, 3, 1, 2).contiguous() if on_maps else x.flatten(1, 2)
        modules["timm"] = (make(dim, grid[0] * grid[1]), theirs)
    row: dict[str, Any] = {"mixer": name, "grid": list(grid), "dim": dim, "batch": batch}
    row["parameters"] = count_parameters(mixer)
    row["gflops"] = measure_flops(mixer, x) / 1e9 / batch
    for who, (module, given) in modules.items():
        row[f"{who}_mib"] = measure_activation_bytes(module, given) / 2**20 / batch
    for what, make_run in (("forward", forward_of), ("both", both_of)):
        runs = {who: make_run(module, given) for who, (module, given) in modules.items()}
        times = interleave(runs, rounds=rounds, warmup=1, min_seconds=seconds)
        row[f"{what}_ms"] = statistics.median(times["ours"]) * 1e3 / batch
        if "timm" in times:
            row[f"{what}_ratio"] = ratio(times["timm"], times["ours"])
    return row


def parse_grid(text: str) -> tuple[int, int]:
    """`14x14` as a grid."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'"{text}" is not a grid; write it as 14x14.')
    return int(height), int(width)


def main() -> None:
    """Measure, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list_mixers(axes=2)
    parser.add_argument("--mixers", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--grids", nargs="+", type=parse_grid, default=[parse_grid(g) for g in GRIDS])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="shorter runs are repeated up to this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"timm {timm.__version__}, dim {args.dim}, batch {args.batch}, {args.rounds} rounds; per image"
    )
    print(
        f"{'mixer':22} {'grid':>6} {'params':>9} {'GFLOP':>8} {'MiB':>7} {'forward':>9} {'both':>9}"
        f"   timm: {'forward':>17} {'both':>17} {'MiB':>7}"
    )
    rows = []
    for grid in args.grids:
        for name in args.mixers:
            row = measure(name, args.dim, grid, args.batch, args.rounds, args.seconds)
            rows.append(row)
            peer = ""
            if "timm_mib" in row:
                shown = (f"{r['ratio']:5.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in _ratios(row))
                peer = "         " + " ".join(f"{s:>17}" for s in shown) + f" {row['timm_mib']:7.2f}"
            print(
                f"{name:22} {'x'.join(map(str, grid)):>6} {row['parameters']:9} {row['gflops']:8.4f} "
                f"{row['ours_mib']:7.2f} {row['forward_ms']:7.2f}ms {row['both_ms']:7.2f}ms{peer}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


def _ratios(row: dict[str, Any]) -> list[dict[str, float]]:
    return [row["forward_ratio"], row["both_ratio"]]


if __name__ == "__main__":
    main()

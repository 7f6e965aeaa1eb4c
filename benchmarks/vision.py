"""Our vision models beside timm's: forward and training step, throughput and memory. One process, interleaved.

    python -m mixerzoo.benchmarks.vision [--models poolformer_s12 ...] [--batch 8] [--size 224] [--rounds 15]
                                         [--compiled] [--json FILE]

timm runs in its default layout and in channels-last memory format; with --compiled, ours compiled runs beside timm's
compiled and beside our own eager form. A ratio is the other's time over ours, the median over rounds with its
quartiles; above 1 ours is faster. Memory is what a training step keeps for backward.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from mixerzoo import create_model
from mixerzoo.benchmarks.interleaved import interleave, ratio
from mixerzoo.training.cost import measure_activation_bytes
from torch import Tensor, nn

MODELS = ["poolformer_s12", "convformer_s18", "caformer_s18"]


def forward_of(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """An inference run."""

    def run() -> Tensor:
        model.eval()
        with torch.inference_mode():
            return model(x)

    return run


def step_of(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    """A training step with SGD, so that the optimizer hides nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def measure(name: str, batch: int, size: int, rounds: int, *, compiled: bool = False) -> list[dict[str, Any]]:
    """Rows of the table for one model; with `compiled`, `torch.compile` stands around ours and timm's."""
    torch.manual_seed(0)
    x, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    peer_name = name if timm.is_model(name) else f"{name}_224"  # as timm calls models of a fixed size
    rows = []
    for what in ("forward", "training step"):
        make = forward_of if what == "forward" else lambda model, images: step_of(model, images, target)
        for peer in ("timm compiled", "ours eager") if compiled else ("timm", "timm channels-last"):
            # two models at a time: a third one in the process slows the steps of ours by a few percent
            own_twin = peer == "ours eager"
            ours, other, images = (
                create_model(name),
                create_model(name) if own_twin else timm.create_model(peer_name),
                x,
            )
            if compiled:
                ours.compile()
                if not own_twin:
                    other.compile()
            if peer == "timm channels-last":
                other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                images = x.contiguous(memory_format=torch.channels_last)
            seconds = interleave({"ours": make(ours, x), peer: make(other, images)}, rounds=rounds)
            rows.append(
                {
                    "model": name,
                    "what": what,
                    "peer": peer,
                    **ratio(seconds[peer], seconds["ours"]),
                    "images_per_second": batch / sorted(seconds["ours"])[rounds // 2],
                    "peer_images_per_second": batch / sorted(seconds[peer])[rounds // 2],
                }
            )
            if what == "training step" and not compiled:
                rows[-1]["activation_mib"] = measure_activation_bytes(ours.train(), x) / 2**20
                rows[-1]["peer_activation_mib"] = measure_activation_bytes(other.train(), images) / 2**20
    return rows


def main() -> None:
    """Measure, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="ours compiled beside timm's compiled and ours eager")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"timm {timm.__version__}, batch {args.batch} at {args.size}x{args.size}, {args.rounds} rounds")
    columns = f"{'ratio':>6} {'quartiles':>13} {'img/s':>7} {'peer':>7} {'MiB':>7} {'peer':>7}"
    print(f"{'model':16} {'what':14} {'peer':18} {columns}")
    rows = []
    for name in args.models:
        for row in measure(name, args.batch, args.size, args.rounds, compiled=args.compiled):
            rows.append(row)
            memory = "".join(f" {row[k]:7.0f}" for k in ("activation_mib", "peer_activation_mib") if k in row)
            print(
                f"{row['model']:16} {row['what']:14} {row['peer']:18} "
                f"{row['ratio']:6.2f} {row['low']:6.2f}-{row['high']:<6.2f} "
                f"{row['images_per_second']:7.1f} {row['peer_images_per_second']:7.1f}{memory}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""Cross-scan in SS2D beside four gathers, four scans and four scatters; and what an order costs in a block.

    python -m mixerzoo.benchmarks.orders [--sizes 56x56x96 28x28x192] [--batch 4] [--rounds 11] [--json FILE]

The baseline reads the image along the four paths one after the other: a gathered copy, a scan, and a scatter into a sum
for each, with the same weights. Its scans are our kernel `selective_scan`; a second one, "loop", scans token by token,
as the official code does where its CUDA extension is missing. A ratio is the time of a baseline over that of the mixer
`ss2d`, the median over rounds with its quartiles; above 1 ours is faster.
Memory is what a forward pass keeps for backward, and the peak of allocated tensors in a forward and backward pass.

The share of an order is the time of scan and merge alone, for the cross-scan, over that of a block (norm, mixer,
residual, norm, MLP, residual) around `mamba` in that order, with one state for each of C channels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mixerzoo.benchmarks.interleaved import interleave, ratio
from mixerzoo.kernels.selective_scan import selective_scan
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.orders.ordered import Ordered
from mixerzoo.mixers.orders.orders import Order
from mixerzoo.mixers.recurrent.ss2d import SS2D
from mixerzoo.training.cost import measure_activation_bytes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def paths(height: int, width: int) -> list[Tensor]:
    """Rows, columns, and both backwards, as the numbers of the tokens."""
    rows = torch.arange(height * width)
    columns = rows.view(height, width).T.flatten()
    return [rows, columns, rows.flip(0), columns.flip(0)]


def straightforward(mixer: SS2D, x: Tensor, order: Sequence[Tensor], backend: str) -> Tensor:
    """What `mixer` computes on `(B, H, W, C)`, path after path; `backend` of the scans."""
    batch, height, width, _ = x.shape
    u = mixer.in_proj(x)
    if mixer.conv2d is not None:
        u = mixer.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    u = F.silu(u).reshape(batch, height * width, -1)
    total = torch.zeros_like(u)
    for k, path in enumerate(order):
        v = u[:, path]
        r, b, c = F.linear(v, mixer.x_proj[k]).split((mixer.dt_rank, mixer.d_state, mixer.d_state), -1)
        y = selective_scan(
            v,
            F.linear(r, mixer.dt_proj[k]),
            -mixer.A_log[k].exp(),
            b.unsqueeze(2).contiguous(),
            c.unsqueeze(2).contiguous(),
            mixer.D[k],
            delta_bias=mixer.dt_bias[k],
            delta_softplus=True,
            backend=backend,
        )
        assert isinstance(y, Tensor)
        total = total.index_add(1, path, y)
    return mixer.out_proj(mixer.norm(total)).view(batch, height, width, -1)


class Block(nn.Module):
    """A block around a mixer, as the pyramid builds it."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _both(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        function(x).backward(cotangent)

    return run


def _forward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(x)

    return run


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors took at once during a run, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        total += change.nbytes()
        peak = max(peak, total)
    return peak


def measure(size: tuple[int, int, int], batch: int, rounds: int) -> dict[str, Any]:
    """Ratios, bytes and the share of the order at one size, after checking that both compute the same.

    Raises:
        RuntimeError: the two disagree.
    """
    torch.manual_seed(0)
    height, width, dim = size
    mixer = create_mixer("ss2d", dim)
    assert isinstance(mixer, SS2D)
    x, order = torch.randn(batch, *size), paths(height, width)
    cotangent = torch.randn_like(x)

    def baseline(t: Tensor, backend: str = "auto") -> Tensor:
        return straightforward(mixer, t, order, backend)

    def loop(t: Tensor) -> Tensor:
        return baseline(t, "reference")

    with torch.no_grad():
        expected = baseline(x)
        error = float((mixer(x) - expected).abs().max() / expected.abs().max())
    if error > 1e-4:
        raise RuntimeError(f"ss2d and its straightforward formulation differ by {error}.")
    row: dict[str, Any] = {"size": list(size), "batch": batch, "threads": torch.get_num_threads()}
    functions: dict[str, Callable[[Tensor], Tensor]] = {"ours": mixer, "baseline": baseline}
    for what, make in (("forward", lambda f: _forward(f, x)), ("both", lambda f: _both(f, x, cotangent))):
        seconds = interleave({name: make(f) for name, f in functions.items()}, rounds=rounds)
        row[what] = ratio(seconds["baseline"], seconds["ours"])
        row[f"{what}_ms"] = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
        slow = interleave({"ours": make(mixer), "loop": make(loop)}, rounds=3, warmup=1)
        row[f"{what}_loop"] = ratio(slow["loop"], slow["ours"])
    for name, function in functions.items():
        row[f"{name}_kept_bytes"] = measure_activation_bytes(function, x)
        row[f"{name}_peak_bytes"] = peak_bytes(_both(function, x, cotangent))

    # the order alone, as a mixer of sequences reads and writes by it
    ordered = create_mixer("mamba", dim, order="cross_scan", d_state=1, expand=1)
    assert isinstance(ordered, Ordered)
    block = Block(ordered, dim)
    cross_scan = Order("cross_scan")

    def there_and_back(t: Tensor) -> Tensor:
        return cross_scan.merge(cross_scan.scan(t), (height, width))

    row["order_share"] = {}
    for what, order_run, block_run in (
        ("forward", _forward(there_and_back, x), _forward(block, x)),
        ("both", _both(there_and_back, x, cotangent), _both(block, x, cotangent)),
    ):
        seconds = interleave({"order": order_run, "block": block_run}, rounds=rounds, min_seconds=0.02)
        row["order_share"][what] = ratio(seconds["order"], seconds["block"])
    return row


def _size(text: str) -> tuple[int, int, int]:
    """`56x56x96` as (H, W, C)."""
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f'"{text}" is not a size; write it as 56x56x96.')
    return int(parts[0]), int(parts[1]), int(parts[2])


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(56, 56, 96), (28, 28, 192)], metavar="HxWxC")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch}, {args.rounds} rounds")
    rows = []
    for size in args.sizes:
        row = measure(size, args.batch, args.rounds)
        rows.append(row)
        print("x".join(map(str, size)))
        for what, title in (("forward", "forward"), ("both", "forward and backward")):
            r, ms, share = row[what], row[f"{what}_ms"], row["order_share"][what]["ratio"]
            loop = row[f"{what}_loop"]["ratio"]
            print(
                f"  {title}: {r['ratio']:.2f} times as fast ({r['low']:.2f} to {r['high']:.2f}); {ms['ours']:.1f} ms "
                f"against {ms['baseline']:.1f} ms; {loop:.1f} times as fast as the loop; scan and merge are "
                f"{share:.1%} of a block"
            )
        mib = {key: row[f"{key}_bytes"] / 2**20 for key in ("ours_kept", "baseline_kept", "ours_peak", "baseline_peak")}
        print(
            f"  kept for backward: {mib['ours_kept']:.0f} MiB against {mib['baseline_kept']:.0f} MiB; peak "
            f"{mib['ours_peak']:.0f} MiB against {mib['baseline_peak']:.0f} MiB"
        )
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

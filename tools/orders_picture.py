"""From which inputs the centre's output depends under each token order, as a picture.

    python -m mixerzoo.tools.orders_picture [--out docs/orders_receptive_field.png] [--mixer mamba] [--seeds 8]

One untrained mixer on random tokens; the norm of the gradient of the centre's output, averaged over seeds, relative to
the largest. Grey inputs have none: the output does not depend on them at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from ..mixers import Grid, create_mixer

DIM = 32
PLANE, CLIP = (15, 15), (5, 9, 9)
# title, order
PLANES: list[tuple[str, Any]] = [
    ("raster", "raster"),
    ("serpentine", "serpentine"),
    ("hilbert", "hilbert"),
    ("random", "random"),
    ("bidirectional", "bidirectional"),
    ("cross_scan", "cross_scan"),
    ("hilbert, both ways", ["hilbert", "hilbert_reversed"]),
    ("atrous, joined", {"name": "atrous", "size": 5, "joined": True}),
    ("atrous, size 5, rate 1", [{"name": n, "size": 5} for n in ("atrous", "atrous_reversed")]),
    ("atrous, size 5, rate 2", [{"name": n, "size": 5, "rate": 2} for n in ("atrous", "atrous_reversed")]),
    ("atrous, size 5, rate 3", [{"name": n, "size": 5, "rate": 3} for n in ("atrous", "atrous_reversed")]),
    ("window 5x5, moved", [{"name": n, "size": [1, 5, 5], "shift": True} for n in ("window", "window_reversed")]),
]
CLIPS: list[tuple[str, Any]] = [
    ("mate, first layer", None),
    ("frame_interleaved", "frame_interleaved"),
    *[(f"rotary_major, turn {turn}", {"name": "rotary_major", "turn": turn}) for turn in range(4)],
]


def receptive_field(order: Any, grid: Grid, *, mixer: str = "mamba", seeds: int = 8) -> Tensor:
    """The norms of the gradient of the centre's output to all inputs, on the grid, averaged over seeds.

    Args:
        order: token order; None for a mixer of grids.
        grid: of the tokens.
        mixer: by name, with default options.
        seeds: number of weights and inputs.
    """
    total = torch.zeros(grid)
    centre = tuple(s // 2 for s in grid)
    for seed in range(seeds):
        torch.manual_seed(seed)
        built = create_mixer(mixer, DIM, **({} if order is None else {"order": order}))
        x = torch.randn(1, *grid, DIM, requires_grad=True)
        y = built(x)[(0, *centre)]
        # to random directions of the output, in place of the whole Jacobian
        (grad,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
        total += grad[0].norm(dim=-1)
    return total / seeds


def _show(axes: Any, field: Tensor, top: float) -> Any:
    hidden = field.double().masked_fill(field <= 0, float("nan")).numpy()
    axes.set_facecolor("#c9c9c9")
    image = axes.imshow(hidden, norm=LogNorm(1e-4 * top, top, clip=True), cmap="viridis")
    axes.set(xticks=[], yticks=[])
    return image


def draw(path: Path, *, mixer: str, seeds: int) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 11.5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2.6))
    upper, lower = parts
    panels = upper.subplots(3, 4).flatten()
    image = None
    for axes, (title, order) in zip(panels, PLANES, strict=True):
        field = receptive_field(order, PLANE, mixer=mixer, seeds=seeds)
        image = _show(axes, field, float(field.max()))
        axes.set_title(title, fontsize=10)
        axes.plot(PLANE[1] // 2, PLANE[0] // 2, "r+", markersize=9)
    upper.suptitle(f"{mixer} on {PLANE[0]} x {PLANE[1]} tokens: gradient of the output at the cross", fontsize=11)
    blocks: Any = lower.subfigures(3, 2)
    for block, (title, order) in zip(blocks.flatten(), CLIPS, strict=True):
        field = receptive_field(order, CLIP, mixer=mixer if order is not None else "mate", seeds=seeds)
        rows: Any = block.subplots(1, CLIP[0])
        for t, axes in enumerate(rows):
            _show(axes, field[t], float(field.max()))
            axes.set_xlabel(f"t = {t}", fontsize=8)
        rows[CLIP[0] // 2].plot(CLIP[2] // 2, CLIP[1] // 2, "r+", markersize=7)
        block.suptitle(title, fontsize=10)
    assert image is not None
    bar = upper.colorbar(image, ax=list(panels), shrink=0.6)
    bar.set_ticks([bar.norm.vmax * 10.0**-k for k in range(5)], labels=["1", "0.1", "0.01", "0.001", "0.0001"])  # type: ignore[union-attr]
    figure.savefig(path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/orders_receptive_field.png"))
    parser.add_argument("--mixer", default="mamba")
    parser.add_argument("--seeds", type=int, default=8)
    given = parser.parse_args()
    draw(given.out, mixer=given.mixer, seeds=given.seeds)
    print(given.out)


if __name__ == "__main__":
    main()

"""A probe that is sensitive to order: what a linear time-invariant system remembers of a model's frozen tokens.

    python -m mixerzoo.training.order_probe [--mixers mamba attention] [--orders raster cross_scan ...] [--task digits]
        [--epochs 15] [--seeds 2] [--memory 4] [--json FILE]

After SSMProbe: Rethink MAE with Linear Time-Invariant Dynamics (2026), arXiv:2605.00915. Models of ours are trained on
the task, then frozen. Their last tokens are read in an order by

    h_t = a h_{t-1} + (1 - a) B x_t,    class = C h_N,

a in (0, 1) fixed, one for each state. The system forgets, so that the class must be told from what is read last: an
order is as good as its last places. The order gap is the accuracy under the best order less that under the worst one
of those that are fixed and have one path. Several paths have as many states more, so that they stand beside the gap, as
does the mean over all tokens, which has no order.

Axis letters: B batch, N tokens, C channels, D states, P paths, K classes. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..mixers.base import Grid
from ..mixers.orders.orders import LEARNED, Order, is_learned
from ..models import create_model
from ..tasks import Task, create_task
from .data import seed_globally

ORDERS = ("raster", "raster_reversed", "column", "hilbert", "random", "cross_scan", "sinkhorn")
# an isotropic model whose tokens stay as many as they came: 16 of 2x2 pixels of the digits
MODEL: dict[str, Any] = {
    "backbone": "isotropic",
    "dim": 48,
    "depth": 2,
    "mixer": "attention",
    "channel_mixer": {"name": "mlp", "ratio": 2.0},
    "patch_size": 2,
    "position": "learned",
    "init_std": None,
}


class LTIProbe(nn.Module):
    """`C h_N` of a linear time-invariant system that reads tokens in an order; see the module.

    Args:
        dim: channels C.
        num_classes: K.
        grid: of the tokens.
        order: as of a mixer, fixed or learned; None for the mean over all tokens.
        states: D, for each path.
        memory: the longest time constant, in tokens; those of the states are log-uniform from 1 token to it.

    Raises:
        ConfigError: an unknown order, or one with windows: the system reads whole sequences.
    """

    decay: Tensor

    def __init__(
        self, dim: int, num_classes: int, grid: Grid, *, order: Any, states: int = 64, memory: float = 4.0
    ) -> None:
        super().__init__()
        if memory < 1 or states < 1:
            raise ConfigError(f"probe: memory={memory} and states={states} must be at least 1.")
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.order: Any = None
        if order is not None:
            self.order = LEARNED.build(order, dim, grid, key="order") if is_learned(order) else Order(order)
        paths = 1 if self.order is None else self.order.paths
        self.write = nn.Linear(dim, states)  # B
        self.classify = nn.Linear(paths * states, num_classes)  # C
        constants = torch.logspace(0, torch.tensor(float(memory)).log10().item(), states)
        self.register_buffer("decay", torch.exp(-1 / constants))

    def state(self, sequences: Tensor) -> Tensor:
        """The last state (B, P, D) of inputs (B, P, N, D): an exponential average, since the system is linear."""
        age = torch.arange(sequences.shape[2] - 1, -1, -1, device=sequences.device)
        kernel = (1 - self.decay) * self.decay ** age[:, None]  # (N, D)
        return torch.einsum("bpnd,nd->bpd", sequences, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, *grid, C)` to logits `(B, K)`."""
        u = self.write(self.norm(x))
        if self.order is None:
            return self.classify(u.flatten(1, -2).mean(1))
        sequences = self.order.read(x).scan(u)
        if sequences.shape[1] != self.order.paths:
            raise ConfigError("probe.order: windows are sequences of their own; the probe reads whole ones.")
        return self.classify(self.state(sequences).flatten(1))


class Features(NamedTuple):
    """tokens (count, *grid, C) of a split and their classes (count,)."""

    tokens: Tensor
    target: Tensor


def _batches(task: Task, split: str) -> tuple[Tensor, Tensor]:
    batch = task.fetch(split, torch.arange(task.size(split)), train=False, generator=torch.Generator())
    return batch["input"], batch["target"]


def _train(module: nn.Module, data: Features, *, epochs: int, lr: float, batch: int = 64, decay: float = 0.05) -> None:
    """Plain supervised training with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=decay)
    steps = epochs * (len(data.target) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    module.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.target))[: steps // epochs * batch].view(-1, batch):
            loss = F.cross_entropy(module(data.tokens[index]), data.target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, data: Features) -> float:
    """Share of right answers."""
    return (module(data.tokens).argmax(1) == data.target).float().mean().item()


@torch.no_grad()
def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """The last tokens `(count, *grid, C)` of a frozen model."""
    features: Any = getattr(model, "forward_features")  # noqa: B009 - a vision model's
    return torch.cat([features(part).movedim(1, -1) for part in images.split(256)])


def probe(
    features: dict[str, Features], *, order: Any, epochs: int = 40, seed: int = 0, memory: float = 4.0
) -> tuple[float, nn.Module]:
    """Train a probe on the split "train" of frozen features; its accuracy on "test", and the probe.

    Args:
        features: by split.
        order: token order, or None for the mean.
        epochs: of the probe.
        seed: of the probe.
        memory: see `LTIProbe`.
    """
    train, test = features["train"], features["test"]
    seed_globally(seed, "probe")
    grid = tuple(train.tokens.shape[1:-1])
    head = LTIProbe(train.tokens.shape[-1], int(train.target.max()) + 1, grid, order=order, memory=memory)
    _train(head, train, epochs=epochs, lr=5e-3)
    return accuracy(head, test), head


def trained_features(
    task: Task, mixer: Any, *, epochs: int, seed: int, model: dict[str, Any] = MODEL
) -> tuple[float, dict[str, Features]]:
    """Train a model on a task's images; its test accuracy, and the tokens of its last block for both splits."""
    seed_globally(seed, "model")
    known = {k: v for k, v in task.model_kwargs().items() if k != "frames"}
    network = create_model({**model, "mixer": mixer, **known})
    images = {split: Features(*_batches(task, split)) for split in ("train", "test")}
    _train(network, images["train"], epochs=epochs, lr=4e-3)
    score = accuracy(network, images["test"])
    return score, {split: Features(tokens_of(network, data.tokens), data.target) for split, data in images.items()}


def run(
    mixers: Sequence[Any],
    orders: Sequence[Any],
    *,
    task: str = "digits",
    epochs: int = 15,
    seeds: int = 2,
    memory: float = 4.0,
) -> list[dict[str, Any]]:
    """Train every model, freeze it, and probe it under every order; a row for each mixer and seed."""
    data = create_task(task)
    data.open()
    rows = []
    for mixer in mixers:
        for seed in range(seeds):
            score, features = trained_features(data, mixer, epochs=epochs, seed=seed)
            found = {str(order): probe(features, order=order, seed=seed, memory=memory)[0] for order in orders}
            single = [not is_learned(order) and Order(order).paths == 1 for order in orders]
            fixed = [value for value, one in zip(found.values(), single, strict=True) if one]
            rows.append(
                {
                    "mixer": str(mixer),
                    "seed": seed,
                    "model": score,
                    "mean": probe(features, order=None, seed=seed)[0],
                    **found,
                    "gap": max(fixed) - min(fixed) if fixed else 0.0,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, means over seeds in percent."""
    columns = [key for key in rows[0] if key not in ("mixer", "seed")]
    lines = ["| Mixer | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        of = [row for row in rows if row["mixer"] == mixer]
        values = [f"{100 * statistics.mean(row[c] for row in of):.1f}" for c in columns]
        lines.append(f"| `{mixer}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["attention", "mamba"])
    parser.add_argument("--orders", nargs="+", default=list(ORDERS))
    parser.add_argument("--task", default="digits")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--memory", type=float, default=4.0)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    rows = run(given.mixers, given.orders, task=given.task, epochs=given.epochs, seeds=given.seeds, memory=given.memory)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

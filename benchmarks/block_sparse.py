"""Block-sparse attention on a CPU: time against dense attention, and what a choice of blocks loses.

    python -m mixerzoo.benchmarks.block_sparse time [--tokens 16384] [--rounds 3] [--backward] [--density 1 0.5 ...]
    python -m mixerzoo.benchmarks.block_sparse quality [--run FOLDER ...] [--tokens 2048] [--sequences 1] [--only-runs]
    python -m mixerzoo.benchmarks.block_sparse indexers [--run FOLDER] [--tokens 16384] [--candidates 8192 ...]

`time` takes causal blocks at random, the block of the tile among them, at several densities (share of the causal
blocks), and divides the time of `scaled_dot_product_attention` by ours, interleaved in one process.

`quality` measures selectors and permutations on made-up queries and keys and on those of trained models
(`training.run` folders): the share of the attention mass that lies in the chosen blocks, the relative error of the
output, and the share of the causal blocks that is computed. `indexers` compares the hierarchical indexer with the flat
one, by tokens in the candidate blocks: overlap of the chosen tokens, and how many times fewer scores are computed, by
count. Each prints a table; `--plot FILE` draws it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mixerzoo.benchmarks.interleaved import interleave, ratio
from mixerzoo.kernels import block_sparse_attention, blocks_of_mask
from mixerzoo.mixers.attention.attention import Attention
from mixerzoo.mixers.attention.block_selection import SELECTORS, Tiles, pool_blocks
from mixerzoo.mixers.attention.permutations import PERMUTATIONS, segment_index
from mixerzoo.mixers.attention.token_selection import choose_flat, choose_hierarchical
from mixerzoo.models import create_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

HEADS, SIZE = 12, 64
TILE, BLOCK = 256, 128  # of the timing: tiles of 256 queries use PyTorch's fused attention best


def random_blocks(tokens: int, density: float) -> Tensor:
    """(1, HEADS, T, S): this share of the causal blocks, those of the tile itself among them."""
    tiles, blocks, per = tokens // TILE, tokens // BLOCK, TILE // BLOCK
    tile, block = torch.arange(tiles)[:, None], torch.arange(blocks)
    causal = block < (tile + 1) * per
    score = torch.rand(1, HEADS, tiles, blocks, generator=torch.Generator().manual_seed(0)).masked_fill(~causal, -1)
    score = score + 5 * (block // per == tile)
    count = (density * (tile + 1) * per).round().clamp(min=per)
    return (score.argsort(dim=-1, descending=True).argsort(-1) < count) & causal


def time_density(tokens: int, density: float, rounds: int, backward: bool) -> dict[str, float]:
    """Ratio dense by sparse with quartiles, and seconds of ours, at one density."""
    q, k, v, cotangent = (torch.randn(1, tokens, HEADS, SIZE) for _ in range(4))
    mask = random_blocks(tokens, density)
    blocks = blocks_of_mask(mask, TILE, BLOCK)
    steps = -(-tokens // TILE)
    total = HEADS * sum((t + 1) * (TILE // BLOCK) for t in range(steps))

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Any = block_sparse_attention(q, k, v, blocks, causal=True)
        return y

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def run(function: Callable[..., Tensor]) -> None:
        if not backward:
            with torch.no_grad():
                function(q, k, v)
            return
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        function(*leaves).backward(cotangent)

    runs = {"dense": functools.partial(run, dense), "sparse": functools.partial(run, sparse)}
    seconds = interleave(runs, rounds=rounds, warmup=0)
    found = ratio(seconds["dense"], seconds["sparse"])
    return {"density": int(mask.sum()) / total, "seconds": sorted(seconds["sparse"])[rounds // 2], **found}


# -- quality


def made_up(kind: str, tokens: int, heads: int = 4, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, N, H, D). "scattered": all want one key in 32; "heavy_tailed": keys are wanted by a power law."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, size, generator=generator) for _ in range(3))
    if kind == "scattered":
        wanted = torch.rand(1, tokens, heads, 1, generator=generator) < 1 / 32
        direction = F.normalize(torch.randn(1, 1, heads, size, generator=generator), dim=-1) * 6
        return q + direction, k + torch.where(wanted, 1.2, 0.0) * direction, v
    if kind == "heavy_tailed":
        direction = F.normalize(torch.randn(1, 1, heads, size, generator=generator), dim=-1)
        wealth = (
            torch.rand(1, tokens, heads, 1, generator=generator).clamp_min(1e-4).log().neg()
        )  # exp of it: a power law
        return q + 8 * direction, k + wealth * direction, v
    raise ValueError(f"{kind} is not one of scattered, heavy_tailed")


def trained(run: Path, tokens: int, sequences: int = 1) -> list[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Queries, keys and values of every attention layer of a trained model, on test data of its own task."""
    from mixerzoo.tasks import create_task
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    options = {k: v for k, v in config["task"].items() if k != "name"}
    task: Any = create_task(config["task"]["name"], **(options | {"sequence_length": tokens}))
    task.open()
    data = task.model_kwargs()
    if config["model"].get("position") != "learned":  # a table has the length of the training
        data.pop("sequence_length", None)
    model = create_model(config["model"] | ({"mixer": config["mixer"]} if config.get("mixer") else {}) | data)
    model.load_state_dict(load_file(run / "checkpoints" / "best" / "model.safetensors"))
    batch = task.fetch("test", torch.arange(sequences), train=False, generator=torch.Generator())
    found: list[tuple[str, tuple[Tensor, Tensor, Tensor]]] = []

    def keep(name: str, module: Attention, args: tuple[Tensor, ...]) -> None:
        found.append((name, module.project(args[0], None)))

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: keep(name, module, args))
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]
    with torch.no_grad():
        task.loss(model.eval(), batch)
    for hook in hooks:
        hook.remove()
    return found


def dense_attention(qkv: tuple[Tensor, Tensor, Tensor], block: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of causal attention."""
    count = -(-qkv[0].shape[1] // block)
    causal = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
    found: Any = block_sparse_attention(*qkv, blocks_of_mask(causal, block, block), causal=True, return_lse=True)
    return found


def judge(
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
    selector: str,
    options: dict[str, Any],
    permutation: str,
    block: int,
    segment: int,
) -> dict[str, float]:
    """recall of the attention mass, relative error of the output, and density, for causal prefill."""
    q, k, v = qkv
    heads, scale = q.shape[2], q.shape[3] ** -0.5
    index = None
    keys = k
    if permutation != "identity":
        index = segment_index(PERMUTATIONS.entries[permutation], q, k, segment=segment, queries=block, scale=scale)
        keys = k.gather(1, index.transpose(1, 2)[..., None].expand_as(k))
    pooled, pooled_k = pool_blocks(q, block), pool_blocks(keys, block)
    number = torch.arange(pooled.shape[2])
    part = number // (segment // block)
    allowed, own = (part[:, None] > part)[None, None], (part[:, None] == part)
    chosen = SELECTORS.entries[selector](Tiles(pooled, pooled_k, number[None], allowed, scale), **options) | own
    y, lse = block_sparse_attention(
        q, k, v, blocks_of_mask(chosen, block, block), causal=True, k_index=index, return_lse=True
    )
    # what an unsorted own segment shows of the future costs nothing: count blocks up to the tile's own
    causal = torch.ones(len(number), len(number), dtype=torch.bool).tril()
    others = (chosen & ~own).expand(len(q), heads, -1, -1).sum() / (len(q) * heads)
    count = others + (own & causal).sum()
    return {
        "recall": float((lse - dense[1]).exp().mean()),
        "error": float((y - dense[0]).norm() / dense[0].norm()),
        "density": float(count / causal.sum()),
    }


def quality(
    runs: Sequence[Path], tokens: int, block: int, segment: int, sequences: int, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows: inputs, selector, permutation, recall, error, density."""
    inputs = [(kind, made_up(kind, tokens)) for kind in kinds]
    for run in runs:
        inputs += [(f"{run.name} {name.split('.')[1]}", qkv) for name, qkv in trained(run, tokens, sequences)]
    per = segment // block
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("window", {"width": 2 * per, "sinks": per}, "identity"),
        ("strided", {"stride": 4, "width": 1}, "identity"),
        ("random", {"blocks": 2 * per, "width": 1}, "identity"),
        *(("top_k", {"keep": keep}, name) for keep in (0.125, 0.25, 0.5) for name in PERMUTATIONS.entries),
        *(("top_p", {"threshold": 0.7}, name) for name in ("identity", "attention")),
    ]
    rows = []
    with torch.no_grad():
        for label, qkv in inputs:
            dense = dense_attention(qkv, block)
            for selector, options, permutation in cases:
                found = judge(qkv, dense, selector, options, permutation, block, segment)
                shown = f"{selector} {' '.join(str(v) for v in options.values())}"
                rows.append({"inputs": label, "selector": shown, "permutation": permutation, **found})
    return rows


def indexers(run: Path | None, tokens: int, top_k: int, block: int, candidates: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by tokens in candidate blocks: overlap of the hierarchical with the flat choice, and the flat work by ours.

    The overlap is a mean over 256 or so queries, evenly spaced over those that see more than `top_k` keys.
    """
    layers = trained(run, tokens) if run else [("made up", made_up("heavy_tailed", tokens))]
    rows: list[dict[str, Any]] = [{"block": block, "candidates": count} for count in candidates]
    overlaps: list[list[float]] = [[] for _ in candidates]
    for name, (q, k, _) in layers:
        # the heads of a layer are the heads of the indexer, its mean key the one key that they share
        shared = k.mean(2) if k.shape[2] > 1 else k[:, :, 0]
        pick = torch.arange(1, tokens + 1)[top_k :: max(1, tokens // 256)] - 1
        weights = torch.full((1, len(pick), q.shape[2]), q.shape[2] ** -0.5)
        until = (pick + 1)[None]
        flat = choose_flat(q[:, pick], shared, weights, until, top_k, None)
        theirs = torch.zeros(len(pick), tokens, dtype=torch.bool).scatter(1, flat.ids[0], flat.valid[0])
        for row, all_layers, count in zip(rows, overlaps, candidates, strict=True):
            two = choose_hierarchical(
                q[:, pick], shared, weights, until, top_k, None, block_size=block, blocks=count // block
            )
            both = theirs.gather(1, two.ids[0]) & two.valid[0]
            all_layers.append(float((both.sum(1) / theirs.sum(1)).mean()))
            row[name.removesuffix(".mixer")] = all_layers[-1]
            row["measured"] = flat.work / two.work
    for row, all_layers, count in zip(rows, overlaps, candidates, strict=True):
        row["mean"] = sum(all_layers) / len(all_layers)
        row |= {f"{length // 1024}K": work(length, block, count) for length in (16384, 32768, 131072)}
    return rows


def work(tokens: int, block: int, candidates: int) -> float:
    """Scores of the flat indexer by those of the hierarchical one, for the last query of a sequence."""
    return tokens / (tokens / block + min(candidates, tokens))


# -- output


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_quality(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Recall against density for the fractions of `top_k`, a panel for each kind of input."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(row["inputs"] for row in rows))
    figure, axes = plt.subplots(1, len(labels), figsize=(3.2 * len(labels), 3.2), squeeze=False, layout="constrained")
    for axis, label in zip(axes[0], labels, strict=True):
        for name in PERMUTATIONS.entries:
            line = [r for r in rows if r["inputs"] == label and r["permutation"] == name and "top_k" in r["selector"]]
            axis.plot([r["density"] for r in line], [r["recall"] for r in line], marker="o", label=name)
        axis.set(title=label, xlabel="share of causal blocks")
    axes[0][0].set_ylabel("attention mass kept")
    axes[0][-1].legend(title="permutation")
    figure.savefig(file, dpi=90)


def plot_time(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Speed-up against density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name in dict.fromkeys(row["pass"] for row in rows):
        line = [r for r in rows if r["pass"] == name]
        axis.plot([r["density"] for r in line], [r["ratio"] for r in line], marker="o", label=name)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="share of causal blocks", ylabel="times as fast as dense", xscale="log", yscale="log")
    axis.legend()
    figure.savefig(file, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mixerzoo.benchmarks.block_sparse")
    parser.add_argument("what", choices=("time", "quality", "indexers"))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="folders of training runs")
    parser.add_argument("--sequences", type=int, default=1, help="of the test data of a run")
    parser.add_argument("--only-runs", action="store_true", help="no made-up queries and keys")
    parser.add_argument("--block", type=int, help="tokens of a block")
    parser.add_argument("--candidates", type=int, nargs="+", default=[8192], help="tokens in candidate blocks")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    used = {
        "time": {"rounds", "backward", "density", "plot"},
        "quality": {"run", "sequences", "only_runs", "block", "plot"},
        "indexers": {"run", "block", "candidates"},
    }
    for name, value in vars(options).items():
        if name not in used[options.what] | {"what", "tokens", "json"} and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: {options.what} does not take it.")
    if options.what == "time":
        name = "forward and backward" if options.backward else "forward"
        rows: list[dict[str, Any]] = []
        for density in options.density:
            rows.append(
                {"pass": name, **time_density(options.tokens or 16384, density, options.rounds, options.backward)}
            )
    elif options.what == "quality":
        block = options.block or 64
        kinds = () if options.only_runs else ("scattered", "heavy_tailed")
        rows = quality(options.run, options.tokens or 2048, block, 4 * block, options.sequences, kinds)
    else:
        run = options.run[0] if options.run else None
        rows = indexers(run, options.tokens or 16384, 2048, options.block or 128, options.candidates)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows))
    if options.plot:
        (plot_time if options.what == "time" else plot_quality)(rows, options.plot)


if __name__ == "__main__":
    main()

"""Hold parts of your own to the contract, as our tests hold ours.

python -m mixerzoo check my_mixers.py                 every part that the file registers
python -m mixerzoo check mixer pooling                a part by kind and name
python -m mixerzoo check my_mixers.py only=[padding]  promises whose names hold a word
python -m mixerzoo check my_mixers.py --bench         what a mixer costs beside others, too

A fault is one line, with its place. A mixer without one may get hints: class data that could be stronger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from ...errors import ConfigError, unknown
from ...plugins import PARTS, load_plugins
from ...training.cli.explain import show
from ...training.cli.verb import split
from ..base import kinds, parts
from ..bench import WIDTH, measure
from ..hints import hints
from ..report import examine, part_of, place_of


def _chosen(words: Sequence[str]) -> list[tuple[str, str]]:
    """The parts that are asked for, as (kind, name)."""
    if len(words) == 2 and words[0] in kinds():
        if words[1] not in parts(words[0]):
            raise unknown(f"check {words[0]}", words[1], parts(words[0]))
        return [(words[0], words[1])]
    if len(words) != 1:
        raise ConfigError(f"check: a file or a module, or a kind ({', '.join(kinds())}) and a name.")
    before = {id(part.value) for part in PARTS}
    (plugin,) = load_plugins(words, key="check")
    new = [part for part in PARTS if not part.is_ours and id(part.value) not in before]
    found = new or [part for part in PARTS if part.value.__module__ in plugin.modules]
    pairs = [(part.kind.replace(" ", "_"), part.name) for part in found]
    return [(kind, name) for kind, name in pairs if kind in kinds()]


def _bench(name: str) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("tokens", "mixer", "forward", "with backward", "kept for backward", "state"):
        table.add_column(column, justify="left" if column in ("tokens", "mixer") else "right")
    grid = None
    for line in measure(name):
        tokens = " x ".join(map(str, line.grid)) if line.grid != grid else ""
        grid = line.grid
        state = "" if line.state is None else f"{line.state / 1024:,.1f} KiB"
        times = (f"{1000 * seconds:,.2f} ms" for seconds in (line.forward, line.both))
        table.add_row(tokens, line.name, *times, f"{line.activations / 2**20:,.2f} MiB", state)
    show(table)
    print(f"(one sample, {WIDTH} channels, float32, {torch.get_num_threads()} threads; medians, taken in turns)")


def main(arguments: Sequence[str]) -> int:
    """Print a line for every fault, with its place; returns 1 when there is one."""
    bench = "--bench" in arguments
    words, settings = split([text for text in arguments if text != "--bench"], verb="check")
    only = settings.pop("only", "").strip("[]")
    if settings:
        raise unknown("check", next(iter(settings)), ["only", "plugins"])
    chosen = _chosen(words)
    if not chosen:
        raise ConfigError(f"check: {words[0]} has no part of a kind with a contract: {', '.join(kinds())}.")

    def wanted(promise: str) -> bool:
        return not only or any(word.strip() in promise for word in only.split(","))

    failed = 0
    for kind, name in chosen:
        found = examine(kind, name, wanted)
        for fault in found.faults:
            print(fault)
        untried = f", {found.untried} not tried before that is mended" if found.untried else ""
        print(f'{kind} "{name}": {found.kept} promises kept, {found.broken} broken{untried}')
        failed += found.broken
        if kind == "mixer" and not found.broken and not only:
            for hint in hints(name):
                print(f'{place_of(part_of(kind, name))}: hint: mixer "{name}" {hint}')
        if kind == "mixer" and bench and not found.broken:
            _bench(name)
    return 1 if failed else 0

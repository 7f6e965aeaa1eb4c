"""Hold parts of your own to the contract, as our tests hold ours.

python -m mixerzoo check my_mixers.py                 every part that the file registers
python -m mixerzoo check mixer pooling                a part by kind and name
python -m mixerzoo check my_mixers.py only=[padding]  promises whose names hold a word
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError, unknown
from ...plugins import PARTS, load_plugins
from ...training.cli.verb import split
from ..base import kinds, parts, run


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
    found = [part for part in PARTS if id(part.value) not in before or part.value.__module__ in plugin.modules]
    named = [(part.kind.replace(" ", "_"), part.name) for part in found]
    return [(kind, name) for kind, name in named if kind in kinds()]


def main(arguments: Sequence[str]) -> int:
    """Print a line for every promise that is broken; returns 1 when there is one."""
    words, settings = split(arguments, verb="check")
    only = settings.pop("only", "").strip("[]")
    if settings:
        raise unknown("check", next(iter(settings)), ["only", "plugins"])
    chosen = _chosen(words)
    if not chosen:
        raise ConfigError(f"check: {words[0]} has no part of a kind with a contract: {', '.join(kinds())}.")
    failed = 0
    for kind, name in chosen:
        kept = broken = 0
        for result in run(kind, [name]):
            if only and not any(word.strip() in result.promise for word in only.split(",")):
                continue
            if result.status == "kept":
                kept += 1
                continue
            broken += 1
            print(
                result.message if result.status == "broken" else f'{kind} "{name}": {result.promise}: {result.message}'
            )
        print(f'{kind} "{name}": {kept} promises kept, {broken} broken')
        failed += broken
    return 1 if failed else 0

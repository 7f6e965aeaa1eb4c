"""List what there is: mixers, models, tasks, ablations, or any other kind of part.

python -m mixerzoo list                                  what can be listed
python -m mixerzoo list mixers causal=true streams=true  by what they can do
python -m mixerzoo list models '*former*'                by a pattern
python -m mixerzoo list mixers plugins=[my_mixers.py]    with those of your own
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

import yaml

from ....errors import ConfigError, unknown
from ....mixers import list_mixers
from ....mixers.registry import mixer_class
from ....models import list_models
from ....plugins import PARTS
from ....tasks import list_tasks
from ....tasks.base import task_class
from ...ablation.preset import list_ablations, read_preset
from ..verb import split


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].replace("`", "")


def _kinds() -> dict[str, Callable[[], dict[str, str]]]:
    """Kind, in the plural -> a function that gives its names, each with a line."""
    known: dict[str, Callable[[], dict[str, str]]] = {
        "mixers": lambda: {name: mixer_class(name).source for name in list_mixers()},
        "models": lambda: dict.fromkeys(list_models(), ""),
        "tasks": lambda: {name: _first_line(task_class(name).__doc__) for name in list_tasks()},
        "ablations": lambda: {name: str(read_preset(name).get("title", "")) for name in list_ablations()},
        "claims": lambda: {
            name: " ".join(read_preset(name, "claim")["claim"]["says"].split()) for name in list_ablations("claim")
        },
    }
    list_models()  # every part is registered then
    list_mixers()
    for kind in sorted({part.kind for part in PARTS} - {"mixer", "task"}):
        known[f"{kind.replace(' ', '_')}s".replace("xs", "xes")] = lambda kind=kind: {
            part.name: _first_line(part.value.__doc__) for part in PARTS if part.kind == kind
        }
    return known


def main(arguments: Sequence[str]) -> int:
    """Print names, a line each."""
    words, capabilities = split(arguments, verb="list")
    kinds = _kinds()
    if not words:
        print("\n".join(kinds))
        return 0
    if words[0] not in kinds:
        raise unknown("list", words[0], kinds)
    found = kinds[words[0]]()
    if capabilities:
        if words[0] != "mixers":
            raise ConfigError(
                f"list {words[0]}: {', '.join(capabilities)}: only mixers are listed by what they can do."
            )
        able = list_mixers(**{key: yaml.safe_load(value) for key, value in capabilities.items()})
        found = {name: line for name, line in found.items() if name in able}
    for pattern in words[1:]:
        found = {name: line for name, line in found.items() if fnmatch.fnmatch(name, pattern)}
    width = max(map(len, found), default=0)
    print("\n".join(f"{name:{width}}  {line}".rstrip() for name, line in sorted(found.items())) or "(none)")
    return 0

"""`train.py --help`: what it does, examples, and every setting with a line of explanation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config import CONFIGS, RunConfig, TrainConfig
from .compose import load_named_plugins, parse_overrides
from .explain import explained
from .program import program

EXAMPLES = (
    ("", "the default: a small model on digits"),
    ("model=poolformer_s12 mixer=attention task=digits", "another mixer in the same backbone"),
    ("-m mixer=identity,pooling,attention seed=0,1 resume=auto", "a comparison, with a table and a report at its end"),
    ("-m ablation=vision", "an ablation of configs/ablation/"),
    ("plugins=[my_mixers.py] mixer=my_mixer", "a mixer of your own"),
    ("resume=runs/NAME", "go on where a run was stopped"),
)


def _settings() -> list[tuple[str, str, str]]:
    """Key, default and meaning of every setting, in the order of `configs/train.yaml`."""
    found, section = [], ""
    for line in (CONFIGS / "train.yaml").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"( *)([a-z_]+): *([^#]*?) *(#.*)?", line)
        if match is None or line.startswith("defaults"):
            continue
        indent, key, value, comment = match.groups()
        if not indent:
            section = "" if value else f"{key}."
        if section == "hydra." or (not value and not indent):
            continue
        cls = TrainConfig if indent else RunConfig
        said = explained(cls, key)
        meaning = said.replace("None", "null") or (comment or "").lstrip("# ")
        found.append((f"{section if indent else ''}{key}", value, meaning))
    return found


def print_help(overrides: Sequence[str] = ()) -> None:
    """Print the help; of a command line that chooses a mixer or a task, the options of these.

    Raises:
        ConfigError: a choice that does not exist.
    """
    load_named_plugins(overrides)
    chosen = {str(o.key_or_group): v for o in parse_overrides(overrides) if isinstance(v := o.value(), str)}
    if {"mixer", "task"} & chosen.keys():
        from .verbs.show import show_mixer, show_task

        for key, show in (("mixer", show_mixer), ("task", show_task)):
            if key in chosen:
                show(chosen[key])
                print(f"Set one with {key}.OPTION=VALUE.")
        return
    command = program()
    print(f"usage: {command} [-m] [KEY=VALUE ...]\n")
    print("Trains a model and writes a folder with its scores, costs, curve and checkpoints. -m compares several.\n")
    width = max(len(text) for text, _ in EXAMPLES)
    for text, meaning in EXAMPLES:
        print(f"  {command} {text:{width}}  {meaning}")
    print(
        "\nChoices: model=, mixer=, task=, optimizer= and, with -m, ablation= or claim=. "
        "`python -m mixerzoo list` names them;"
    )
    print("mixer=NAME --help explains the options of a mixer, task=NAME --help those of a task.\n\nSettings:")
    settings = _settings()
    keys, values = max(len(k) for k, _, _ in settings), max(len(v) for _, v, _ in settings)
    for key, value, meaning in settings:
        print(f"  {key:{keys}}  {value:{values}}  {meaning}")

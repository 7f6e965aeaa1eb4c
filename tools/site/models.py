"""The pages of families of models."""

from __future__ import annotations

from collections.abc import Mapping

from ...models.registry import CONFIGS
from ..markdown import table
from ..model_table import KINDS, Family, mixer_names
from ..papers import link, linked, year
from .model_mixing import picture_of_model
from .standings import of_models
from .standings_table import standings_section


def model_page(family: Family, parameters: Mapping[str, int], *, quick: bool = False) -> tuple[str, bytes | None]:
    """The page of a family, and the picture of its smallest model.

    Args:
        family: its models.
        parameters: by the name of a model.
        quick: without a picture.
    """
    names = sorted(family.models, key=lambda name: parameters[name])
    comments = dict(zip(family.models, family.comments, strict=True))
    configs = dict(zip(family.models, family.configs, strict=True))
    papers = ", ".join(map(link, family.papers))
    rows = [
        ("Year", year(" ".join(family.comments)) or year(f"arXiv:{family.papers[0]}") or ""),
        ("Kind", KINDS[family.kind]),
        ("Token mixers", ", ".join(f"[`{name}`](../mixers/{name}.md)" for name in family.mixers)),
    ]
    parts = [f"# {family.name}", table(("Paper", papers), rows)]
    sizes = [
        (
            f"`{name}`",
            f"{parameters[name]:,}",
            ", ".join(f"`{mixer}`" for mixer in mixer_names(configs[name])),
            linked(comments[name]),
        )
        for name in names
    ]
    parts += ["## Models", table(("Model", "Parameters", "Token mixers", "What it is"), sizes)]
    example = names[0]
    picture = None
    if not quick:
        picture, caption = picture_of_model(example, configs[example])
        image = f"![Strength of the dependence of an output on inputs]({family.name}.png)"
        parts += ["## What it mixes", image, caption]
    parts += [
        "## Use it",
        f'```python\nfrom mixerzoo import create_model\n\nmodel = create_model("{example}")\n```',
        f"`python -m mixerzoo show {example}` prints its parts with shapes, parameters, FLOPs and memory; "
        f"`mixer=NAME` puts another mixer into it. `python train.py model={example} task=TASK` trains it.",
        "## Configuration",
        f"`configs/model/{example}.yaml`:",
        f"```yaml\n{(CONFIGS / f'{example}.yaml').read_text(encoding='utf-8').strip()}\n```",
        "## In the stored comparisons",
        standings_section(of_models(family.models)),
    ]
    return "\n\n".join(parts) + "\n", picture

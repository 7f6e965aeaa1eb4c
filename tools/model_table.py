"""`docs/models.md`, from the configurations of all models: `python -m mixerzoo.tools.model_table` writes it.

A family is what the names of models begin with, `caformer` of `caformer_s18`. Its papers are those of the first
comments of its files in `configs/model/`. Parameters are counted on models without memory, on the device `meta`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..mixers.registry import mixer_class
from ..models import create_model, list_models
from ..models.registry import CONFIGS, model_config
from ..training.cost import count_parameters
from .markdown import table
from .papers import arxiv_ids, link

PATH = Path(__file__).resolve().parent.parent / "docs" / "models.md"
KINDS = {"pyramid": "Pyramids", "isotropic": "Isotropic", "language": "Sequences and language"}

_HEAD = """\
# All models

Written by `python -m mixerzoo.tools.model_table` from the files of `configs/model/`. Every one is a name for
`create_model(NAME)` and for `python train.py model=NAME`; in every one `mixer=` puts another mixer into its place.
`python -m mixerzoo show NAME` prints the parts with shapes and costs.

- *Pyramids* take images and make the grid of tokens smaller from stage to stage.
- *Isotropic* models take images, or clips, and keep one grid.
- *Sequences and language*: tokens in, tokens out. Models of published sizes have the published vocabularies; those that
  end in `_tiny` read bytes.

Parameters are those with the number of classes, the image size or the vocabulary that the file names.
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one name.

    Attributes:
        name: what their names begin with.
        models: names of its members.
        configs: their configurations.
        comments: the first comments of their files.
    """

    name: str
    models: tuple[str, ...]
    configs: tuple[Mapping[str, Any], ...]
    comments: tuple[str, ...]

    @property
    def kind(self) -> str:
        return str(self.configs[0]["backbone"])

    @property
    def mixers(self) -> list[str]:
        """Names of the token mixers, in the order of the layers."""
        return list(dict.fromkeys(name for config in self.configs for name in mixer_names(config)))

    @property
    def papers(self) -> list[str]:
        """arXiv ids of the first sentences about its members; where there are none, of its first mixer."""
        found = [paper for comment in self.comments for paper in arxiv_ids(comment)]
        return list(dict.fromkeys(found)) or arxiv_ids(mixer_class(self.mixers[0]).source)


def mixer_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the token mixers of a configuration, in the order of stages or layers."""
    mixer = config["mixer"]
    specs = mixer if isinstance(mixer, Sequence) and not isinstance(mixer, str) else [mixer]
    return list(dict.fromkeys(str(spec if isinstance(spec, str) else spec["name"]) for spec in specs))


def first_comment(name: str) -> str:
    """The first comment of a model's file, up to the first line that is none, on one line."""
    lines: list[str] = []
    for line in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def families() -> list[Family]:
    """All families, by name."""
    members: dict[str, list[str]] = {}
    for name in list_models():
        members.setdefault(name.partition("_")[0], []).append(name)
    return [
        Family(name, tuple(models), tuple(map(model_config, models)), tuple(map(first_comment, models)))
        for name, models in sorted(members.items())
    ]


def count(name: str) -> int:
    """Parameters of a model as its file has it."""
    with torch.device("meta"):
        return count_parameters(create_model(name))


def counts(names: Sequence[str] | None = None) -> dict[str, int]:
    """Parameters by name; of all models it takes a quarter of a minute."""
    return {name: count(name) for name in (list_models() if names is None else names)}


def counts_in(page: str) -> dict[str, int]:
    """The parameters that a written page states."""
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("| `"): int(row[2].replace(",", "")) for row in rows}


def large(number: int) -> str:
    """`26.3M`, `64k`."""
    if number >= 1e9:
        return f"{number / 1e9:.1f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def _input(config: Mapping[str, Any]) -> str:
    if "vocab_size" in config:
        return f"ids below {config['vocab_size']:,}"
    size = config.get("image_size") or 224
    sides = f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))
    channels = config.get("in_chans", 3)
    frames = f"{config['frames']} frames of " if config.get("frames") else ""
    return f"{frames}{channels}x{sides}"


def _section(family: Family, parameters: Mapping[str, int]) -> str:
    rows = [
        (f"`{name}`", ", ".join(f"`{mixer}`" for mixer in mixer_names(config)), f"{parameters[name]:,}", _input(config))
        for name, config in sorted(
            zip(family.models, family.configs, strict=True), key=lambda entry: parameters[entry[0]]
        )
    ]
    papers = ", ".join(map(link, family.papers))
    return f"### {family.name}\n\n{papers}\n\n" + table(("Model", "Token mixers", "Parameters", "Input"), rows) + "\n"


def render(parameters: Mapping[str, int]) -> str:
    """The whole page, given the parameters by name."""
    parts = [_HEAD]
    for kind, title in KINDS.items():
        parts.append(f"## {title}\n")
        parts += [_section(family, parameters) for family in families() if family.kind == kind]
    return "\n".join(parts)


def short_table(parameters: Mapping[str, int], target: str) -> str:
    """A line for every family: its models, mixers, sizes and papers.

    Args:
        parameters: by model.
        target: where the name of a family leads, `{}` standing for the name.
    """
    rows = []
    for family in sorted(families(), key=lambda family: (list(KINDS).index(family.kind), family.name)):
        sizes = sorted(parameters[name] for name in family.models)
        span = large(sizes[0]) if len(sizes) == 1 else f"{large(sizes[0])} to {large(sizes[-1])}"
        names = sorted(family.models, key=lambda name: parameters[name])
        ends = ", ".join(f"`{name.removeprefix(family.name)}`" for name in names)
        papers = ", ".join(map(link, family.papers))
        mixers = ", ".join(f"`{mixer}`" for mixer in family.mixers)
        rows.append((f"[`{family.name}`]({target.format(family.name)})", ends, mixers, span, papers))
    return table(("Family", "Models", "Token mixers", "Parameters", "Paper"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or with `--check` exit with 1 when it is out of date."""
    parser = argparse.ArgumentParser(description="Write docs/models.md from the models' configurations.")
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 when it differs")
    options = parser.parse_args(arguments)
    page = render(counts())
    if not options.check:
        PATH.write_text(page, encoding="utf-8")
    elif not PATH.is_file() or PATH.read_text(encoding="utf-8") != page:
        raise SystemExit("docs/models.md is out of date; run: python -m mixerzoo.tools.model_table")


if __name__ == "__main__":
    main()

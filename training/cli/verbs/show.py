"""Show a model (its parts with shapes and costs), or the options of a mixer or a task.

python -m mixerzoo show caformer_s18
python -m mixerzoo show caformer_s18 mixer=afno image_size=160
python -m mixerzoo show mamba2_tiny sequence_length=1024
python -m mixerzoo show mamba2                           a mixer: its options, and what it can do
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ....errors import ConfigError, unknown
from ....mixers import list_mixers, mixer_options
from ....mixers.registry import ORDER_OPTIONS, mixer_class
from ....models import create_model, list_models
from ....schema import shown
from ....tasks import list_tasks, task_options
from ....tasks.base import task_class
from ...cost import count_parameters, measure_activation_bytes, measure_flops
from ..verb import split

# What an input has where neither the model nor the user says.
IMAGE_SIZE, TOKENS = 224, 256


def main(arguments: Sequence[str]) -> int:
    """Print what is known of one model, mixer or task."""
    words, settings = split(arguments, verb="show")
    if len(words) != 1:
        raise ConfigError("show: one name, of a model, a mixer or a task; see python -m mixerzoo list.")
    name = words[0]
    if name in list_mixers():
        cls = mixer_class(name)
        options = {**mixer_options(name), **(ORDER_OPTIONS if 1 in cls.axes else {})}
        _options(f'mixer "{name}"', cls, options, settings)
        facts = {
            key: getattr(cls, key) for key in ("axes", "causal", "masks", "packs", "streams", "complexity", "memory")
        }
        print("  ".join(f"{key}={value}" for key, value in facts.items()))
    elif name in list_tasks():
        _options(f'task "{name}"', task_class(name), task_options(name), settings)
    elif name in list_models() or name.endswith((".yaml", ".yml")):
        _model(name, {key: yaml.safe_load(value) for key, value in settings.items()})
    else:
        raise unknown("show", name, [*list_models(), *list_mixers(), *list_tasks()], limit=0)
    return 0


def explained(cls: type, option: str) -> str:
    """What a class's docstring says of an option, under `Args:`."""
    for base in cls.__mro__:
        lines = inspect.cleandoc(base.__doc__ or "").splitlines()
        for i, line in enumerate(lines):
            names, colon, text = line.strip().partition(": ")
            if line.startswith("    ") and colon and option in names.split(", "):
                depth = len(line) - len(line.lstrip())
                for further in lines[i + 1 :]:
                    if len(further) - len(further.lstrip()) <= depth or not further.strip():
                        break
                    text += " " + further.strip()
                return text.replace("`", "")
    return ""


def _options(title: str, cls: type, options: Mapping[str, inspect.Parameter], settings: Mapping[str, str]) -> None:
    if settings:
        raise ConfigError(f"show: {', '.join(settings)}: only models take settings here.")
    print(f"{title}: {inspect.cleandoc(cls.__doc__ or '').partition(chr(10))[0].replace('`', '')}")
    table = Table(box=None, pad_edge=False)
    for column in ("option", "type", "default", ""):
        table.add_column(column, overflow="fold")
    for name, option in options.items():
        default = "(needed)" if option.default is inspect.Parameter.empty else repr(option.default)
        table.add_row(name, shown(option.annotation), default, explained(cls, name))
    _print(table)


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _example(model: nn.Module, config: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """An input of the model's native size."""
    if "vocab_size" in config:
        return (torch.zeros(1, int(config.get("sequence_length") or TOKENS), dtype=torch.int64),)
    size = config.get("image_size") or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    frames = config.get("frames")
    clip = (int(frames),) if frames else ()
    return (torch.zeros(1, int(config.get("in_chans", 3)), *clip, height, width),)


def _number(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


class _Row:
    """A part of the model, and the call that it got."""

    def __init__(self, name: str, depth: int, module: nn.Module) -> None:
        self.name, self.depth, self.module = name, depth, module
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.shape = ""

    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.call = (args, kwargs)
        first = output[0] if isinstance(output, (tuple, list)) else output
        self.shape = " x ".join(map(str, first.shape)) if isinstance(first, Tensor) else ""

    @property
    def kind(self) -> str:
        inner = [
            type(m).__name__
            for m in (getattr(self.module, "mixer", None), getattr(self.module, "channel_mixer", None))
            if m
        ]
        return type(self.module).__name__ + (f" ({', '.join(inner)})" if inner else "")

    def figures(self) -> tuple[str, ...]:
        if self.call is None:
            return (self.kind, "", _number(count_parameters(self.module)), "", "")
        args, kwargs = self.call
        kept = measure_activation_bytes(self.module, *args, **kwargs)
        flops = measure_flops(self.module, *args, **kwargs)
        return (self.kind, self.shape, _number(count_parameters(self.module)), _number(flops), f"{_number(kept)}B")


def _rows(model: nn.Module, prefix: str = "", depth: int = 0) -> list[_Row]:
    """The parts of a model down to its blocks; a block has a mixer."""
    rows = []
    for name, child in model.named_children():
        if not count_parameters(child) and not list(child.children()):
            continue
        row = _Row(f"{prefix}{name}", depth, child)
        rows.append(row)
        is_list = isinstance(child, (nn.ModuleList, nn.Sequential))
        if is_list or any(isinstance(c, (nn.ModuleList, nn.Sequential)) for c in child.children()):
            rows += _rows(child, f"{prefix}{name}.", depth + 1)
    return rows


def _model(name: str, settings: dict[str, Any]) -> None:
    image_size = settings.get("image_size")
    model = create_model(name, **settings).eval()
    config = getattr(model, "model_config")  # noqa: B009 - only models of ours have it
    example = _example(model, {**config, **({"image_size": image_size} if image_size else {})})
    rows = _rows(model)
    hooks = [row.module.register_forward_hook(row.record, with_kwargs=True) for row in rows]
    with torch.no_grad():
        model(*example)
    for hook in hooks:
        hook.remove()
    table = Table(box=None, pad_edge=False)
    for column in ("part", "kind", "output", "parameters", "FLOPs", "kept for backward"):
        table.add_column(column, justify="right" if column in ("parameters", "FLOPs", "kept for backward") else "left")
    for first, last, row in _merged([(row, row.figures()) for row in rows]):
        label = first.name if first is last else f"{first.name} to {last.name.rpartition('.')[2]}"
        table.add_row("  " * first.depth + label, *row)
    _print(table)
    flops = measure_flops(model, *example)
    total = f"{_number(count_parameters(model))} parameters, {_number(flops)} FLOPs (a multiply-add is 2)"
    kept = measure_activation_bytes(model, *example)
    print(f"{name}, input {' x '.join(map(str, example[0].shape))}: {total}, {_number(kept)}B kept for backward")
    if hasattr(model, "state_bytes"):
        try:
            held = model.state_bytes(example[0].shape[1])
            print(f"decoding state after {example[0].shape[1]} tokens: {_number(held)}B")
        except ConfigError as error:
            print(f"does not decode token by token: {error}")


def _merged(rows: list[tuple[_Row, tuple[str, ...]]]) -> list[tuple[_Row, _Row, tuple[str, ...]]]:
    """Neighbours of equal figures as one row, from the first to the last of them."""
    done: list[tuple[_Row, _Row, tuple[str, ...]]] = []
    for row, figures in rows:
        if done and done[-1][2] == figures and done[-1][1].depth == row.depth and row.name[-1].isdigit():
            done[-1] = (done[-1][0], row, figures)
        else:
            done.append((row, row, figures))
    return done

"""Show a model (its parts with shapes and costs), or the options of a mixer or a task.

python -m mixerzoo show caformer_s18
python -m mixerzoo show caformer_s18 mixer=afno image_size=160
python -m mixerzoo show mamba2_tiny sequence_length=1024
python -m mixerzoo show mamba2                           a mixer: its options, and what it can do
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import Tensor, nn

from ....errors import ConfigError, unknown
from ....mixers import list_mixers, mixer_options
from ....mixers.orders.ordered import Ordered
from ....mixers.registry import ORDER_OPTIONS, mixer_class
from ....models import create_model, list_models
from ....tasks import list_tasks, task_options
from ....tasks.base import task_class
from ...cost import count_parameters, measure_activation_bytes, measure_flops
from ..explain import options_table, show
from ..verb import split

# What an input has where neither the model nor the user says.
IMAGE_SIZE, TOKENS = 224, 256


def main(arguments: Sequence[str]) -> int:
    """Print what is known of one model, mixer or task."""
    words, settings = split(arguments, verb="show")
    if len(words) != 1:
        raise ConfigError("show: one name, of a model, a mixer or a task; see python -m mixerzoo list.")
    name = words[0]
    if name in list_models() or name.endswith((".yaml", ".yml")):
        _model(name, {key: yaml.safe_load(value) for key, value in settings.items()})
        return 0
    if settings:
        raise ConfigError(f"show {name}: {', '.join(settings)}: only models take settings here.")
    if name in list_mixers():
        show_mixer(name)
    elif name in list_tasks():
        show_task(name)
    else:
        raise unknown("show", name, [*list_models(), *list_mixers(), *list_tasks()], limit=12)
    return 0


def _options(title: str, classes: Sequence[type], options: Mapping[str, inspect.Parameter]) -> None:
    print(f"{title}: {inspect.cleandoc(classes[0].__doc__ or '').partition(chr(10))[0].replace('`', '')}")
    show(options_table(options, classes))


def show_mixer(name: str) -> None:
    """A mixer's options, and what it can do."""
    cls = mixer_class(name)
    options = {**mixer_options(name), **(ORDER_OPTIONS if 1 in cls.axes else {})}
    _options(f'mixer "{name}"', [cls, Ordered], options)
    can = ("axes", "causal", "masks", "packs", "streams", "complexity", "memory")
    print("  ".join(f"{key}={getattr(cls, key)}" for key in can))


def show_task(name: str) -> None:
    """A task's options."""
    _options(f'task "{name}"', [task_class(name)], task_options(name))


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

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
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

    def figures(self, known: dict[tuple[Any, ...], tuple[str, ...]]) -> tuple[str, ...]:
        """Kind, shape and costs; those of a part that is built and called as one before are the same."""
        assert self.call is not None
        args, kwargs = self.call
        given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        shapes = [(name, tuple(x.shape) if isinstance(x, Tensor) else repr(x)) for name, x in given.items()]
        key = (_built(self.module), str(shapes))
        if key not in known:
            known[key] = self._measured(args, kwargs)
        return known[key]

    def _measured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        kept = measure_activation_bytes(self.module, *args, **kwargs)
        flops = measure_flops(self.module, *args, **kwargs)
        return (self.kind, self.shape, _number(count_parameters(self.module)), _number(flops), f"{_number(kept)}B")


def _built(module: nn.Module) -> str:
    """What tells modules apart: the classes inside, their settings, and the shapes of what they hold."""
    plain = (bool, int, float, str, tuple, list, type(None))
    inside = [
        (name, type(m).__qualname__, sorted((k, repr(v)) for k, v in vars(m).items() if isinstance(v, plain)))
        for name, m in module.named_modules()
    ]
    return f"{inside} {[(name, tuple(value.shape)) for name, value in module.state_dict().items()]}"


def _rows(model: nn.Module, prefix: str = "") -> list[_Row]:
    """The parts of a model down to its blocks; a block has a mixer."""
    rows = []
    for name, child in model.named_children():
        if not count_parameters(child) and not list(child.children()):
            continue
        lists = (nn.ModuleList, nn.Sequential)
        if isinstance(child, nn.ModuleList):  # it holds parts, and is none
            rows += _rows(child, f"{prefix}{name}.")
            continue
        rows.append(_Row(f"{prefix}{name}", child))
        if isinstance(child, nn.Sequential) or any(isinstance(c, lists) for c in child.children()):
            rows += _rows(child, f"{prefix}{name}.")
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
    known: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for first, last, row in _merged([(row, row.figures(known)) for row in rows if row.call is not None]):
        label = first.name if first is last else f"{first.name} to {_short(first.name, last.name)}"
        table.add_row(label, *row)
    show(table)
    flops = measure_flops(model, *example)
    total = f"{_number(count_parameters(model))} parameters, {_number(flops)} FLOPs (a multiply-add is 2)"
    kept = measure_activation_bytes(model, *example)
    print(f"{name}, input {' x '.join(map(str, example[0].shape))}: {total}, {_number(kept)}B kept for backward")
    state_bytes: Any = getattr(model, "state_bytes", None)
    if state_bytes is not None:
        try:
            held = state_bytes(example[0].shape[1])
            print(f"decoding state after {example[0].shape[1]} tokens: {_number(held)}B")
        except ConfigError as error:
            print(f"does not decode token by token: {error}")


def _short(first: str, last: str) -> str:
    """The second of two names without what is the same in both."""
    same = [a == b for a, b in zip(first.split("."), last.split("."), strict=True)].index(False)
    return ".".join(last.split(".")[same:])


def _merged(rows: list[tuple[_Row, tuple[str, ...]]]) -> list[tuple[_Row, _Row, tuple[str, ...]]]:
    """Neighbours of equal figures as one row, from the first to the last of them."""
    done: list[tuple[_Row, _Row, tuple[str, ...]]] = []
    for row, figures in rows:
        if done and done[-1][2] == figures and row.name[-1].isdigit():
            done[-1] = (done[-1][0], row, figures)
        else:
            done.append((row, row, figures))
    return done

"""The contract between a task (data, objective, metrics) and the training loop.

Axis letters: B batch, L sequence positions, K classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import plugins
from ..errors import ConfigError, under, unknown
from ..schema import check_options, keyword_options, lists_options
from .preprocessing import Preprocessing

Batch = dict[str, Tensor]
Forward = Callable[..., Tensor]

TASKS: dict[str, type[Task]] = {}


class Task:
    """Base class of all tasks. The loop knows nothing else about the data or the objective.

    A subclass names itself in the class statement and is found from then on; its keyword-only constructor arguments,
    with type hints and defaults, are the options that `task.<option>=...` sets. The constructor checks its options and
    touches no file; `open` does.

        class Digits(ImageTask, name="digits"):
            def __init__(self, *, label_smoothing: float = 0.0): ...

    Data are reached by index: a split is `size(split)` samples, and `fetch` makes a batch of some of them. The loop
    owns the order (a function of seed and epoch), so every task can be resumed in mid-epoch, sharded over processes and
    loaded by worker processes, without doing anything for it. A task of random windows or synthetic sequences treats
    the index as the window's or the sequence's number.

    A batch is a dict of tensors, first axis B. `"input"`, `"target"` and `"index"` (the sample numbers, int64, used in
    error messages) are always there; a task may add others (`"mask"`, `"document_ids"`, `"position"`), which only its
    own `loss` and `update` read.

    Attributes:
        name: the name in the registry.
        metric: name of the primary metric, one of the scalars that `compute` returns.
        higher_is_better: its direction; the best checkpoint is chosen by it on the split `"val"`.
        unit: what `count` counts, for throughput: "images", "tokens", "clips".
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "samples"

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is None:  # a shared base of several tasks
            return
        other = TASKS.get(name)
        if other is not None and not plugins.same_place(other, cls):
            raise ConfigError(f'task "{name}" exists already: {other.__module__}.{other.__qualname__}.')
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
            named = parameter.kind is inspect.Parameter.KEYWORD_ONLY or lists_options(parameter)
            if cls.__init__ is not object.__init__ and not named:
                raise ConfigError(f'task "{name}": the option "{parameter.name}" must be keyword-only.')
        cls.name = name
        TASKS[name] = cls
        plugins.note("task", name, cls)

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        """Options for the contract, which tries the task on few small samples.

        A task of a user's files writes some into `folder`, an empty one. None where data must come from elsewhere: only
        the class itself is then looked at.
        """
        return {}

    # -- data

    def open(self) -> None:
        """Find, read and check the data. Called once, before anything else below.

        Raises:
            ConfigError: data that are missing, empty, unreadable or not what the options say.
        """
        raise NotImplementedError

    def splits(self) -> tuple[str, ...]:
        """The splits that exist: always "train" and "val", which is used for choices; "test" where it is kept apart."""
        return ("train", "val", "test")

    def size(self, split: str) -> int:
        """Number of samples of a split."""
        raise NotImplementedError

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        """Make a batch on the CPU, possibly in a worker process.

        Args:
            split: one of `splits()`.
            index: (B,) int64 sample numbers below `size(split)`.
            train: with augmentation; otherwise the result depends on `index` alone.
            generator: source of all randomness of this batch, seeded from seed, epoch and batch number.

        Raises:
            ConfigError: a sample that cannot be read, naming it.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the data, part of the run's summary. Called after `open`."""
        raise NotImplementedError

    def labels(self, split: str) -> Tensor | None:
        """The class of every sample of a split, (size,) int64; None for tasks without classes. Called after `open`."""
        return None

    def notes(self) -> list[str]:
        """What a person should know about the data, a line each: what was left out and why, what is done to samples.

        A line that begins with "warning: " is a reason to doubt the figures. Called after `open`.
        """
        return []

    def preprocessing(self) -> Preprocessing | None:
        """What evaluation does to one raw sample, kept with the weights for `mixerzoo.load`; None where it is not said.

        Called after `open`.
        """
        return None

    # -- model

    def model_kwargs(self) -> dict[str, Any]:
        """What the data demand of a model, given to `create_model`. Called after `open`.

        Images: `num_classes`, `in_chans`, `image_size` (H, W). Text: `vocab_size`, `sequence_length`. Keys that the
        kind of model does not know (a fully convolutional pyramid needs no image size) are dropped by the caller.
        """
        raise NotImplementedError

    def example(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """Inputs of the right shape and dtype for `model(*example)`, to count FLOPs and to find shape errors early."""
        raise NotImplementedError

    def check_output(self, output: Any) -> None:
        """Hold what a model makes of `example` against what the task needs; by default anything will do.

        Raises:
            ConfigError: another kind of output.
        """

    # -- objective

    def check_batch(self, size: int) -> None:
        """Hold the number of samples that `augment` and `loss` will get at a time against what they can take.

        Raises:
            ConfigError: another number is needed.
        """

    def augment(self, batch: Batch) -> Batch:
        """Augmentation of a whole training batch on its device (mixup), with the global generators."""
        return batch

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        """The training loss, a scalar: the mean over the batch's `targets`; 0, with a gradient, where there are none.

        The loop weighs the losses of the parts of an optimizer step, accumulated or of other processes, by their
        targets, so that the step has the loss of the whole batch however it is divided.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor:
        """What `loss` is a mean over, as a number: a scalar of the batch's device; by default its samples.

        Called with what `fetch` gave, before `augment`. A task whose samples have different numbers of targets says so
        here.
        """
        return torch.tensor(batch["index"].shape[0], device=batch["index"].device)

    def count(self, batch: Batch) -> int:
        """Number of `unit`s in a batch."""
        return int(batch["index"].shape[0])

    # -- evaluation

    def metrics(self) -> dict[str, Any]:
        """Fresh `torchmetrics.Metric` objects by name; they are reduced over processes by torchmetrics."""
        raise NotImplementedError

    def update(self, metrics: Mapping[str, Any], model: Forward, batch: Batch) -> None:
        """Run the model on an evaluation batch and update the metrics."""
        raise NotImplementedError

    def compute(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Final figures: floats for scalars (among them `metric` and usually "loss"), nested lists for matrices."""
        return {
            name: value.item() if (value := m.compute()).ndim == 0 else value.tolist() for name, m in metrics.items()
        }


def discover() -> dict[str, type[Task]]:
    """All tasks, after importing every module of this folder."""
    plugins.discover(__name__.rpartition(".")[0])
    return TASKS


def list_tasks() -> list[str]:
    """Names of all tasks."""
    return sorted(discover())


def task_class(name: str, *, key: str = "task.name") -> type[Task]:
    """The class registered under `name`.

    Raises:
        ConfigError: no such task; the message holds `key` and the nearest name.
    """
    found = discover().get(name) if isinstance(name, str) else None
    if found is None:
        raise unknown(key, name, TASKS)
    return found


def task_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a task, from its constructor: name -> parameter with default and resolved type hint."""
    cls = task_class(name)
    return {} if cls.__init__ is object.__init__ else keyword_options(cls)


def create_task(name: str, *, key: str = "task", **options: Any) -> Task:
    """Build a task. Its data are read by `open()`.

    Args:
        name: a name from `list_tasks()`.
        key: path of the configuration key, for error messages.
        options: keyword-only arguments of the task's constructor; see `task_options(name)`.

    Raises:
        ConfigError: unknown task or option, or a value of the wrong type.
    """
    cls = task_class(name, key=f"{key}.name")
    check_options(options, task_options(name), key=key, owner=f'task "{name}"')
    with under(key):
        return cls(**options)

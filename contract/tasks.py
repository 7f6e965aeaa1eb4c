"""What tasks promise: data that depend on their number alone, a loss that is a mean over targets, figures that add up.

Axis letters: B batch.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import create_model
from ..models.registry import backbone_class
from ..schema import keyword_options
from ..tasks import Batch, Task, create_task, list_tasks, task_class
from .base import kind_of_part, promise, require
from .tools import near, perturbed

KIND = "task"
SMALL = {"mixer": "attention", "channel_mixer": None}
# models of every shape of work: the first that takes what a task gives, and gives what it needs, is used
MODELS: tuple[dict[str, Any], ...] = (
    {"backbone": "language", "dim": 16, "depth": 1, "position": "learned", **SMALL},
    {"backbone": "isotropic", "dim": 16, "depth": 1, "patch_size": 4, **SMALL},
    {
        "backbone": "isotropic",
        "dim": 16,
        "depth": 1,
        "patch_size": 4,
        "head": {"name": "upsample", "width": 8},
        **SMALL,
    },
)

kind_of_part(KIND, list_tasks)


@contextlib.contextmanager
def opened(name: str) -> Iterator[Task]:
    """The task with the small data that its class says."""
    with tempfile.TemporaryDirectory() as folder:
        options = task_class(name).tried_with(Path(folder))
        assert options is not None
        task = create_task(name, **options)
        task.open()
        yield task


def can_be_tried(name: str) -> bool:
    """Whether the class has small data to try it with; others need files that only a user has."""
    with tempfile.TemporaryDirectory() as folder:
        return task_class(name).tried_with(Path(folder)) is not None


def fetch(task: Task, split: str, index: list[int], *, train: bool = False, seed: int = 0) -> Batch:
    """A batch of samples."""
    generator = torch.Generator().manual_seed(seed)
    return task.fetch(split, torch.tensor(index), train=train, generator=generator)


def model_for(task: Task) -> nn.Module:
    """A small model for the task, in evaluation mode.

    Raises:
        BrokenPromise: none of `MODELS` suits.
    """
    demanded = task.model_kwargs()
    said = []
    for config in MODELS:
        known = keyword_options(backbone_class(config).config_class)
        if ("vocab_size" in demanded) != ("vocab_size" in known):
            continue
        given = {key: value for key, value in demanded.items() if key in known}
        causal = {"causal": False} if given.get("objective") == "masked_lm" else {}
        try:
            torch.manual_seed(0)
            model = perturbed(create_model({**config, **given, **causal}), std=0.1).eval()
            with torch.no_grad():
                task.check_output(model(*task.example(2)))
        except ConfigError as error:
            said.append(str(error))
            continue
        return model
    require(False, "No model takes what the task gives, or gives what it needs.", demanded=demanded, said=said)
    raise AssertionError


@promise(KIND)
def class_data_are_stated(name: str) -> None:
    """The class says what it is and what it measures, and all its options have defaults or types."""
    cls = task_class(name)
    require(cls.__doc__, "The class has no docstring.")
    require(isinstance(getattr(cls, "metric", None), str), "`metric` is not stated.")
    require(isinstance(cls.higher_is_better, bool), "`higher_is_better` is no bool.")
    require(isinstance(cls.unit, str) and cls.unit, "`unit` is not stated.")
    if cls.__init__ is not object.__init__:
        for option, parameter in keyword_options(cls).items():
            require(parameter.annotation is not inspect.Parameter.empty, "An option has no type.", option=option)


@promise(KIND, applies=can_be_tried)
def data_are_there_and_the_same_again(name: str) -> None:
    """`train` and `val` hold samples, and opening the data again gives the same fingerprint."""
    prints = []
    for _ in range(2):
        with opened(name) as task:
            splits = task.splits()
            require({"train", "val"} <= set(splits), "`train` or `val` is missing.", splits=splits)
            for split in splits:
                require(task.size(split) > 0, "A split is empty.", split=split)
                labels = task.labels(split)
                whole = labels is None or labels.shape == (task.size(split),)
                require(whole, "There is not a label for every sample.", split=split)
            prints.append(task.fingerprint())
    hexadecimal = len(prints[0]) == 64 and set(prints[0]) <= set("0123456789abcdef")
    require(hexadecimal, "The fingerprint is no SHA-256.", got=prints[0])
    require(prints[0] == prints[1], "The same data have two fingerprints.", got=prints)


@promise(KIND, applies=can_be_tried)
def samples_depend_on_their_number_alone(name: str) -> None:
    """Outside of training a sample is the same in any order, for any generator; in training the generator decides."""
    with opened(name) as task:
        for split in task.splits():
            count = min(4, task.size(split))
            index = list(range(count))
            batch, turned = fetch(task, split, index), fetch(task, split, index[::-1], seed=1)
            for key in ("input", "target", "index"):
                require(key in batch, "A batch lacks an entry.", key=key, has=sorted(batch))
            require(batch["index"].tolist() == index, "`index` is not what was asked for.", got=batch["index"].tolist())
            for key, value in batch.items():
                told = {"split": split, "key": key}
                require(value.shape[0] == count, "The first axis is not the batch.", shape=tuple(value.shape), **told)
                require(_same(value.flip(0), turned[key]), "A sample depends on more than its number.", **told)
        index = list(range(min(4, task.size("train"))))
        first, again = (fetch(task, "train", index, train=True, seed=3) for _ in range(2))
        for key, value in first.items():
            require(_same(value, again[key]), "A training batch is not its generator's.", key=key)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@promise(KIND, applies=can_be_tried)
def the_example_is_as_the_data(name: str) -> None:
    """`example` has the dtype of the data, and a model of `model_kwargs` takes both and gives a finite loss."""
    with opened(name) as task:
        model, batch = model_for(task), fetch(task, "train", [0, 1], train=True)
        (example, *_) = task.example(2)
        require(example.dtype == batch["input"].dtype, "The example has another dtype.", got=example.dtype)
        require(example.ndim == batch["input"].ndim, "The example has another rank.", got=tuple(example.shape))
        loss = task.loss(model, task.augment(batch))
        require(loss.ndim == 0 and loss.isfinite(), "The loss is no finite scalar.", got=loss.detach())
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        require(any(grad.any() for grad in grads), "The loss has no gradient.")
        require(all(grad.isfinite().all() for grad in grads), "A gradient is not finite.")
        require(task.count(batch) > 0, "`count` is not positive.", got=task.count(batch))


@promise(KIND, applies=can_be_tried)
def the_loss_is_a_mean_over_targets(name: str) -> None:
    """The loss of a batch is that of its parts, each weighed by its `targets`."""
    with opened(name) as task, torch.no_grad():
        model = model_for(task)
        index = list(range(min(4, task.size("val"))))
        whole = fetch(task, "val", index)
        parts = [fetch(task, "val", part) for part in (index[:1], index[1:])]
        counts = [float(task.targets(part)) for part in parts]
        expected = sum(count * task.loss(model, part) for count, part in zip(counts, parts, strict=True))
        total = float(task.targets(whole))
        require(total == sum(counts), "`targets` of parts do not add up.", whole=total, parts=counts)
        mean = torch.as_tensor(expected) / max(total, 1.0)
        near(task.loss(model, whole), mean, "The loss is not the mean over its targets.", targets=counts)


@promise(KIND, applies=can_be_tried)
def figures_do_not_depend_on_how_data_are_divided(name: str) -> None:
    """`compute` gives finite figures, `metric` among them, the same for a batch as for its parts."""
    with opened(name) as task, torch.no_grad():
        model = model_for(task)
        index = list(range(min(6, task.size("val"))))

        def figures(*parts: list[int]) -> dict[str, Any]:
            metrics = task.metrics()
            for part in parts:
                task.update(metrics, model, fetch(task, "val", part))
            return task.compute(metrics)

        whole, divided = figures(index), figures(index[:1], index[1:])
        require(task.metric in whole, "`metric` is not among the figures.", metric=task.metric, figures=sorted(whole))
        for key, value in whole.items():
            a, b = torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(divided[key], dtype=torch.float64)
            require(a.isfinite().all(), "A figure is not finite.", figure=key)
            near(a, b, "A figure depends on how the data are divided.", figure=key)


@promise(KIND, applies=can_be_tried)
def the_metric_sees_the_model(name: str) -> None:
    """Another model gives other figures."""
    with opened(name) as task, torch.no_grad():
        index = list(range(min(6, task.size("val"))))
        seen: list[dict[str, Any]] = []
        change: Callable[[nn.Module], nn.Module]
        for change in (lambda model: model, lambda model: perturbed(model, std=1.0, seed=7)):
            metrics = task.metrics()
            task.update(metrics, change(model_for(task)), fetch(task, "val", index))
            seen.append(task.compute(metrics))
        require(seen[0] != seen[1], "The figures do not depend on the model.", figures=seen[0])

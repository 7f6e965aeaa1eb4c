"""From a configuration to everything that a run needs, and all that it would refuse, before anything is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, OptionError, unknown
from ..mixers.part import stated
from ..models import create_model
from ..tasks import Task, create_task
from ..tasks.images.augment import seeded
from .config import RunConfig, model_options
from .cost import count_parameters, measure_activation_bytes, measure_flops
from .data import TrainingData, seed_globally
from .optim import build_optimizer


def make_task(config: RunConfig) -> Task:
    """The task of a configuration, not yet opened."""
    options = dict(config.task)
    name = options.pop("name", None)
    if name is None:
        raise ConfigError("task.name: missing.")
    return create_task(name, **options)


def make_model(config: RunConfig, task: Task) -> nn.Module:
    """The model of a configuration for an opened task, with weights that depend on the seed alone."""
    seed_globally(config.seed, "weights")
    options = model_options(config, task.model_kwargs())
    try:
        model = create_model(
            config.model, checkpoint=config.checkpoint, memory_check=config.train.memory_check, **options
        )
    except OptionError as error:
        if config.mixer is not None and error.option.startswith("model.mixer"):
            raise OptionError(error.option.removeprefix("model."), error.reason) from None  # the key that was typed
        raise
    if config.train.grad_checkpointing:
        enable = getattr(model, "set_grad_checkpointing", None)
        if enable is None:
            raise ConfigError("train.grad_checkpointing: this model cannot recompute its blocks.")
        enable(True)
    return model


def costs(model: nn.Module, task: Task) -> dict[str, Any]:
    """What the model costs for one sample of the task, counted on the CPU; also shows whether it takes the data at all.

    `flops` counts all arithmetic of a forward pass, `flops_matrix` only matrix products, convolutions, attention and
    FFTs, as published figures do. `activation_bytes` is what one sample keeps for the backward pass.
    """
    example = task.example(1)
    training = model.training
    model.eval()
    with torch.no_grad():
        task.check_output(model(*example))
    figures = {
        "parameters": count_parameters(model),
        "trainable_parameters": count_parameters(model, trainable=True),
        "flops": measure_flops(model, *example),
        "flops_matrix": measure_flops(model, *example, elementwise=False),
        "activation_bytes": measure_activation_bytes(model, *example),
    }
    model.train(training)
    return figures


def training_data(config: RunConfig, task: Task, *, rank: int, world: int, device: torch.device) -> TrainingData:
    """The training batches of a configuration; see `TrainingData`."""
    return TrainingData(
        task,
        seed=config.seed,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        rank=rank,
        world=world,
        workers=config.train.workers,
        device=device,
    )


def rehearse(model: nn.Module, task: Task) -> None:
    """Metrics, the loss among them, of a sample or two on the CPU, so that what model or task refuse is refused here.

    An example shows the shape of the data; a batch may also hold masks, documents and other lengths. Weights, buffers
    and generators are left as they were.

    Raises:
        ConfigError: whatever the data, the model or the task refuse.
    """
    training, buffers = model.training, {name: value.clone() for name, value in model.named_buffers()}
    generator, metrics = torch.Generator().manual_seed(0), task.metrics()
    with seeded(generator), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metrics that have seen too little
        few = torch.arange(min(2, task.size("train")))
        batch = task.fetch("train", few, train=True, generator=generator)
        task.targets(batch)
        if len(few) == 2:
            task.augment(batch)
        task.update(metrics, model.train(), batch)
        batch = task.fetch("val", torch.arange(1), train=False, generator=generator)
        task.update(metrics, model.eval(), batch)
        figures = task.compute(metrics)
    if task.metric not in figures:
        raise ConfigError(f'task "{task.name}": no {task.metric} among its figures {", ".join(figures)}.')
    for name, value in model.named_buffers():
        if name in buffers and buffers[name].shape == value.shape:
            value.copy_(buffers[name])
    model.train(training)


def check_aux_losses(model: nn.Module, weights: Mapping[str, float] | None) -> None:
    """Refuse weights for losses that no part of the model adds, by the class data of its parts.

    Raises:
        OptionError: such a name.
    """
    known = {name for module in model.modules() for name in stated(type(module), "aux_losses")}
    for name in weights or ():
        if name not in known:
            raise unknown("train.aux_losses", name, known)


def check(config: RunConfig, task: Task | None = None) -> None:
    """Hold a configuration against data and model without training.

    Args:
        config: of the run.
        task: of this configuration, if it is opened already.

    Raises:
        ConfigError: whatever `run` would refuse before it starts.
    """
    if task is None:
        task = make_task(config)
        task.open()
    model = make_model(config, task)
    check_aux_losses(model, config.train.aux_losses)
    build_optimizer(model, config.optimizer)
    training_data(config, task, rank=0, world=int(os.environ.get("WORLD_SIZE", 1)), device=torch.device("cpu"))
    with torch.no_grad():
        task.check_output(model.eval()(*task.example(1)))
    rehearse(model, task)
    key = "output_dir" if config.run_dir is None else "run_dir"
    check_writable(Path(getattr(config, key)), key=key)


def check_writable(folder: Path, *, key: str) -> None:
    """Refuse a folder that cannot be made or written.

    Raises:
        ConfigError: naming what stands in the way.
    """
    here = folder
    while not here.exists() and here != here.parent:
        here = here.parent
    if not here.is_dir():
        raise ConfigError(f"{key}: {folder} cannot be made: {here} is a file.")
    if not os.access(here, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {folder} cannot be made: {here} is not writable.")

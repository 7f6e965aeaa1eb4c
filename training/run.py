"""One run from its configuration to its summary."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, unknown
from ..models import create_model
from ..tasks import Task, create_task
from . import run_folder as report
from .checkpoint import find_checkpoint
from .config import RunConfig, code_version, identity, model_options, outside_code, run_name
from .cost import (
    count_parameters,
    measure_activation_bytes,
    measure_flops,
    peak_memory_bytes,
    reset_peak_memory,
    spread,
)
from .data import TrainingData, seed_globally
from .loop import Trainer
from .optim import build_optimizer
from .progress import Display


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
    model = create_model(config.model, checkpoint=config.checkpoint, **model_options(config, task.model_kwargs()))
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
    build_optimizer(model, config.optimizer)
    with torch.no_grad():
        task.check_output(model.eval()(*task.example(1)))


def _make_accelerator(config: RunConfig, folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import LoggerType, ProjectConfiguration

    names = [str(name.value) for name in LoggerType if name.value != "all"]
    if config.tracker is not None and config.tracker not in names:
        raise unknown("tracker", config.tracker, names)
    if PartialState._shared_state and PartialState().num_processes == 1:
        # the state is one per process, and the next run of a sweep may want another precision or device
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if config.train.precision == "fp16" and (config.train.device == "cpu" or not torch.accelerator.is_available()):
        raise ConfigError("train.precision: fp16 needs a GPU; on a CPU use bf16 or no.")
    accelerator = Accelerator(
        cpu=config.train.device == "cpu",
        mixed_precision=config.train.precision,
        log_with=config.tracker,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )
    if config.tracker is not None and not accelerator.log_with:
        raise ConfigError(f'tracker: the package of "{config.tracker}" is not installed. `tracker=null` turns it off.')
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MPS"):
        raise ConfigError(
            f"accelerate launch: {accelerator.distributed_type.value} is not supported by the checkpoints here; "
            "use one process or data parallelism."
        )
    return accelerator


def _choose_folder(config: RunConfig, identifier: str) -> Path:
    """The run's folder; not created here."""
    if config.resume not in (None, "auto"):
        return Path(str(config.resume))
    named = config.run_dir is not None
    folder = (
        Path(config.run_dir) if config.run_dir is not None else Path(config.output_dir) / run_name(config, identifier)
    )
    if config.resume == "auto":
        if (folder / "config.yaml").exists() and _stored_identity(folder) != identifier:
            raise ConfigError(f"resume: {folder} holds a run of another configuration, seed or version of the code.")
        return folder
    if named and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"run_dir: {folder} is not empty. Use another, or resume={folder} to continue what is there.")
    numbered, number = folder, 1
    while numbered.exists():  # nothing finished is overwritten
        number += 1
        numbered = folder.with_name(f"{folder.name}-{number}")
    return numbered


def _stored_identity(folder: Path) -> str | None:
    lines = report.read_lines(folder / "identity.jsonl")
    return lines[-1]["identity"] if lines else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def run(config: RunConfig, *, task: Task | None = None, code: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate and report; returns the summary.

    With `resume`, a finished run is not repeated: its summary is returned.

    Args:
        config: of the run.
        task: of this configuration, if it is opened already; runs of a sweep share it.
        code: version of the code that runs, by default that of the files as they are now.
        quiet: print nothing and draw no curve, which the report of a sweep does for all of its runs.

    Raises:
        ConfigError: a mistake in the configuration or the data, before the run's folder is created; or data that turn
            out bad later, or a loss that is not finite.
        loop.Interrupted: a signal came and the state is saved.
    """
    from accelerate.utils import broadcast_object_list

    code = code or code_version()
    identifier = identity(config, code)
    folder = _choose_folder(config, identifier)
    accelerator = _make_accelerator(config, folder)
    folder = broadcast_object_list([folder])[0]  # a process may have looked after another one had created it
    summary_path = folder / "summary.json"
    opened = task is not None
    task = task or make_task(config)
    display = Display(main=accelerator.is_main_process and not quiet, bar=config.progress, unit=task.unit)
    if config.resume is not None and summary_path.exists():
        display.say(f"{folder} is finished already; see summary.json there.")
        return report.read_json(summary_path)
    checkpoint = find_checkpoint(folder / "checkpoints" / "last") if config.resume is not None else None
    if config.resume not in (None, "auto") and _stored_identity(folder) != identifier:
        warnings.warn(f"{folder} was started with another version of the code; its end may differ.", stacklevel=2)

    if not opened:
        with accelerator.main_process_first():  # one process downloads, the others find it
            task.open()
    model = make_model(config, task)
    optimizer = build_optimizer(model, config.optimizer)
    data = TrainingData(
        task,
        seed=config.seed,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=config.train.workers,
        device=accelerator.device,
    )
    figures = costs(model, task)

    trainer = Trainer(
        config,
        accelerator=accelerator,
        task=task,
        model=model,
        optimizer=optimizer,
        data=data,
        folder=folder,
        display=display,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    kept: list[dict[str, Any]] = []
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            report.write_config(folder / "config.yaml", replace(config, resume=None).as_dict())
        kept = report.keep_code(folder, outside_code(config))
        report.append_line(folder / "identity.jsonl", {"identity": identifier, "code": code, "step": trainer.step})
    accelerator.wait_for_everyone()
    if config.tracker is not None:
        accelerator.init_trackers(config.tracker, config=_flat(config.as_dict()))
    _announce(display, config, task, figures, trainer, folder)
    reset_peak_memory(accelerator.device)
    trainer.fit()
    split, final = trainer.finish()
    summary = {
        "status": "finished",
        "identity": identifier,
        "code": code,
        "git": report.git_revision(),
        "model": config.model_name,
        "mixer": None if config.mixer is None else config.mixer.get("name"),
        "task": config.task["name"],
        "seed": config.seed,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "value": final[task.metric],
        "split": split,
        "final": final,
        "selected": config.train.select,
        "best": trainer.best,
        "weights": f"checkpoints/{config.train.select}/{_stem(config)}.safetensors",
        "steps": trainer.total,
        "epochs": trainer.total / data.steps_per_epoch,
        **figures,
        "throughput": {"unit": f"{task.unit}/s", **spread(trainer.rates)},
        "train_seconds": trainer.seconds,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "processes": accelerator.num_processes,
        "plugins": kept,
        "device": str(accelerator.device),
        "data": {"sha256": task.fingerprint(), "sizes": {s: task.size(s) for s in task.splits()}},
        "environment": report.environment(),
    }
    if accelerator.is_main_process:
        lines = report.read_lines(folder / "metrics.jsonl")
        title = f"{folder.name}   {split} {task.metric} {final[task.metric]:.4f}"
        if not quiet:
            report.draw_curve(folder / "curve.png", lines, metric=task.metric, title=title)
        report.write_json(summary_path, summary)
    accelerator.log({f"{split}/{k}": v for k, v in final.items() if isinstance(v, float)}, step=trainer.total)
    accelerator.end_training()
    scalars = "  ".join(f"{k} {v:.4f}" for k, v in final.items() if isinstance(v, float))
    display.say(f"{split}: {scalars}  ({trainer.seconds:.1f} s of training)")
    display.say(f"summary, curve and checkpoints: {folder}")
    return summary


def _stem(config: RunConfig) -> str:
    return "ema" if config.train.select == "last" and config.train.ema is not None else "model"


def _announce(
    display: Display, config: RunConfig, task: Task, figures: Mapping[str, Any], trainer: Trainer, folder: Path
) -> None:
    mixer = "" if config.mixer is None else f" with {config.mixer.get('name')}"
    sizes = ", ".join(f"{task.size(s):,} {s}" for s in task.splits())
    display.say(
        f"{config.model_name or 'model'}{mixer}: {figures['parameters']:,} parameters, "
        f"{figures['flops'] / 1e6:,.1f} MFLOPs per forward of one sample"
    )
    display.say(f"{config.task['name']}: {sizes}; {trainer.total:,} steps on {trainer.accelerator.device}")
    display.say(f"{'continuing at step ' + str(trainer.step) if trainer.step else 'writing'}: {folder}")

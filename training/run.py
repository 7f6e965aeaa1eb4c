"""One run from its configuration to its summary."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, unknown
from ..tasks import Task
from . import run_folder as report
from .checkpoint import find_checkpoint
from .config import RunConfig, code_version, identity, outside_code, run_name
from .cost import peak_memory_bytes, reset_peak_memory, spread
from .identity import DATA, data_lines, describe_data, flat, refuse_other_data, refuse_other_run, stored, tells
from .loop import DivergedError, Trainer
from .optim import build_optimizer
from .prepare import check_aux_losses, check_writable, costs, make_model, make_task, rehearse, training_data
from .progress import Display
from .quoting import argument


def _make_accelerator(config: RunConfig) -> Any:
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
        # the run's folder takes its place when it is known
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )
    if config.tracker is not None and not accelerator.log_with:
        raise ConfigError(f'tracker: the package of "{config.tracker}" is not installed. `tracker=null` turns it off.')
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MPS"):
        raise ConfigError(
            f"accelerate launch: {accelerator.distributed_type.value} is not supported by the checkpoints here; "
            "use one process or data parallelism."
        )
    return accelerator


def _choose_folder(config: RunConfig, start: _Start) -> Path:
    """The run's folder; not created here.

    Raises:
        ConfigError: it holds another run, or cannot be written.
    """
    if config.resume not in (None, "auto"):
        folder = Path(str(config.resume))
        refuse_other_data(folder, start.data)
        return folder
    named = config.run_dir is not None
    folder = Path(str(config.run_dir if named else Path(config.output_dir) / run_name(config, start.identity)))
    check_writable(folder, key="run_dir" if named else "output_dir")
    if config.resume == "auto":
        if not named and not folder.exists():  # it may have been renamed
            folder = report.runs_of(Path(config.output_dir)).get(start.identity, folder)
        if (folder / "config.yaml").exists():
            refuse_other_run(folder, config, **vars(start))
        return folder
    if named and folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"run_dir: {folder} is not empty. Use another, or {argument('resume', folder)} to continue what is there."
        )
    numbered, number = folder, 1
    while numbered.exists() and not named:  # nothing finished is overwritten
        number += 1
        numbered = folder.with_name(f"{folder.name}-{number}")
    return numbered


@dataclass(frozen=True)
class _Start:
    """What tells a run apart; see `identity`."""

    identity: str
    code: str
    outside: list[str]
    data: dict[str, Any]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat(values).items()}


def run(
    config: RunConfig,
    *,
    task: Task | None = None,
    code: str | None = None,
    data: dict[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train, evaluate and report; returns the summary.

    With `resume`, a finished run is not repeated, if it is of the same data: its summary is returned.

    Args:
        config: of the run.
        task: of this configuration, if it is opened already; runs of a sweep share it.
        code: version of the code that runs, by default that of the files as they are now.
        data: record of the data, see `describe_data`, if it is known already.
        quiet: print nothing and draw no curve, which the report of a sweep does for all of its runs.

    Raises:
        ConfigError: a mistake in the configuration or the data, or other data than those of the run to be continued,
            before the run's folder is created; or data that turn out bad later, or a loss that is not finite. What is
            refused in the first step leaves no folder either.
        loop.Interrupted: a signal came and the state is saved.
    """
    this = _begin(config, task, code, data, quiet)
    if config.resume is not None and this.summary.exists():
        this.display.say(f"{this.folder} is finished already; see summary.json there.")
        return report.read_json(this.summary)
    trainer, figures = _build(this)
    kept = _train(this, trainer, figures)
    return _conclude(this, trainer, figures, kept)


@dataclass(frozen=True)
class _Run:
    """What the steps of a run share.

    Attributes:
        task: opened.
        folder: not created yet.
        quiet: print nothing and draw no curve.
    """

    config: RunConfig
    accelerator: Any
    task: Task
    start: _Start
    folder: Path
    display: Display
    quiet: bool

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"


def _begin(config: RunConfig, task: Task | None, code: str | None, data: dict[str, Any] | None, quiet: bool) -> _Run:
    """First step: devices and data, and from these the run's identity and folder."""
    from accelerate.utils import broadcast_object_list

    code = code or code_version()
    accelerator = _make_accelerator(config)
    if task is None:
        task = make_task(config)
        with accelerator.main_process_first():  # one process downloads, the others find it
            task.open()
    data = data or describe_data(task)
    identifier = identity(config, code, tells(data))
    start = _Start(identifier, code, sorted(part.sha256 for part in outside_code(config)), data)
    # a process may have looked after another one had created it
    folder: Path = broadcast_object_list([_choose_folder(config, start)])[0]
    accelerator.project_configuration.project_dir = accelerator.project_configuration.logging_dir = str(folder)
    display = Display(main=accelerator.is_main_process and not quiet, bar=config.progress, unit=task.unit)
    return _Run(config, accelerator, task, start, folder, display, quiet)


def _build(this: _Run) -> tuple[Trainer, dict[str, Any]]:
    """Second step: the trainer, tried in one step and where a checkpoint left off, and what its model costs."""
    config, accelerator, task, start = this.config, this.accelerator, this.task, this.start
    checkpoint = find_checkpoint(this.folder / "checkpoints" / "last") if config.resume is not None else None
    if config.resume not in (None, "auto") and stored(this.folder)["identity"] != start.identity:
        warnings.warn(f"{this.folder} was started with another version of the code; its end may differ.", stacklevel=3)
    model = make_model(config, task)
    check_aux_losses(model, config.train.aux_losses)
    optimizer = build_optimizer(model, config.optimizer)
    batches = training_data(
        config, task, rank=accelerator.process_index, world=accelerator.num_processes, device=accelerator.device
    )
    figures = costs(model, task)
    rehearse(model, task)
    trainer = Trainer(
        config,
        accelerator=accelerator,
        task=task,
        model=model,
        optimizer=optimizer,
        data=batches,
        folder=this.folder,
        display=this.display,
        facts={
            "task": config.task,
            "classes": start.data["classes"],
            "preprocessing": None if (prepared := task.preprocessing()) is None else prepared.describe(),
            "data": start.data["sha256"],
            "seed": config.seed,
            "identity": start.identity,
        },
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    return trainer, figures


def _train(this: _Run, trainer: Trainer, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Third step: the folder with what is known so far, and the training; returns the record of code from outside."""
    config, accelerator, start, folder = this.config, this.accelerator, this.start, this.folder
    kept: list[dict[str, Any]] = []
    fresh = not folder.exists() or not any(folder.iterdir())
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            report.write_config(folder / "config.yaml", replace(config, resume=None).as_dict())
        kept = report.keep_code(folder, outside_code(config))
        if not (folder / DATA).exists():
            report.write_json(folder / DATA, start.data)
        line = {"identity": start.identity, "code": start.code, "outside": start.outside, "step": trainer.step}
        report.append_line(folder / "identity.jsonl", line)
    accelerator.wait_for_everyone()
    if config.tracker is not None:
        accelerator.init_trackers(config.tracker, config=_flat(config.as_dict()))
    _announce(this, figures, trainer)
    reset_peak_memory(accelerator.device)
    try:
        trainer.fit()
    except ConfigError as error:
        # refused, and nothing learnt: the corrected command finds no leftovers
        early = trainer.step <= 1 and not (folder / "checkpoints").exists()
        if fresh and early and not isinstance(error, DivergedError) and accelerator.is_main_process:
            accelerator.end_training()
            shutil.rmtree(folder)
        raise
    return kept


def _conclude(this: _Run, trainer: Trainer, figures: Mapping[str, Any], kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Last step: the final evaluation and the summary."""
    config, accelerator, task, start, folder = this.config, this.accelerator, this.task, this.start, this.folder
    split, final = trainer.finish()
    summary = {
        "status": "finished",
        "identity": start.identity,
        "code": start.code,
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
        "epochs": trainer.total / trainer.data.steps_per_epoch,
        **figures,
        "throughput": {"unit": f"{task.unit}/s", **spread(trainer.rates)},
        "train_seconds": trainer.seconds,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "processes": accelerator.num_processes,
        "plugins": kept,
        "device": str(accelerator.device),
        "data": start.data,
        "environment": report.environment(),
    }
    if accelerator.is_main_process:
        lines = report.read_lines(folder / "metrics.jsonl")
        title = f"{folder.name}   {split} {task.metric} {final[task.metric]:.4f}"
        if not this.quiet:
            report.draw_curve(folder / "curve.png", lines, metric=task.metric, title=title)
        report.write_json(this.summary, summary)
    accelerator.log({f"{split}/{k}": v for k, v in final.items() if isinstance(v, float)}, step=trainer.total)
    accelerator.end_training()
    scalars = "  ".join(f"{k} {v:.4f}" for k, v in final.items() if isinstance(v, float))
    this.display.say(f"{split}: {scalars}  ({trainer.seconds:.1f} s of training)")
    this.display.say(f"summary, curve and checkpoints: {folder}")
    return summary


def _stem(config: RunConfig) -> str:
    return "ema" if config.train.select == "last" and config.train.ema is not None else "model"


def _announce(this: _Run, figures: Mapping[str, Any], trainer: Trainer) -> None:
    config, data, display = this.config, this.start.data, this.display
    mixer = "" if config.mixer is None else f" with {config.mixer.get('name')}"
    sizes = ", ".join(f"{size:,} {split}" for split, size in data["sizes"].items())
    display.say(
        f"{config.model_name or 'model'}{mixer}: {figures['parameters']:,} parameters, "
        f"{figures['flops'] / 1e6:,.1f} MFLOPs per forward of one sample"
    )
    display.say(f"{config.task['name']}: {sizes}; {trainer.total:,} steps on {trainer.accelerator.device}")
    for line in data_lines(data):
        display.say(f"  {line}")
    display.say(f"{'continuing at step ' + str(trainer.step) if trainer.step else 'writing'}: {this.folder}")

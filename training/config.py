"""The typed configuration of a run, its checks, and the run's identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .. import plugins
from ..errors import ConfigError, OptionError, unknown
from ..models import list_models, model_config
from ..models.registry import backbone_class
from ..schema import (
    Between,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Probability,
    Seed,
    Size,
    build_dataclass,
    keyword_options,
)
from .schedules import SCHEDULES

PACKAGE = Path(__file__).resolve().parent.parent
CONFIGS = PACKAGE / "configs"

# Where a run is written and how it shows itself does not change what it computes.
# Plugins count by their code, not by where it lies.
NOT_IDENTITY = ("output_dir", "run_dir", "resume", "progress", "tracker", "plugins")


@dataclass(kw_only=True)
class TrainConfig:
    """The section `train` of a configuration; `configs/train.yaml` holds the defaults and says why.

    Attributes:
        epochs: passes over the training split; ignored when `max_steps` is set.
        max_steps: optimizer steps; None for `epochs` passes.
        batch_size: samples per optimizer step, over all processes and accumulated parts.
        accumulate: parts into which a process divides its share of the batch.
        eval_batch_size: samples per evaluation batch and process.
        eval_every: epochs between evaluations; the end is always evaluated.
        select: weights that the final figures are of: "best" on validation, or "last".
        schedule: learning rate over time, by name or mapping; see `schedules`.
        aux_losses: weights of the losses that parts of a model add, by name; 1 for those not named.
        warmup: share of all steps over which the learning rate rises linearly from 0.
        min_lr: final learning rate, as a share of the peak.
        clip_grad: largest gradient norm; None for no clipping.
        ema: decay of the moving average of the weights, which is then what is evaluated; None for none.
        precision: "no" (float32), "bf16" or "fp16" (GPU only).
        compile: compile the model with torch.compile.
        grad_checkpointing: recompute blocks in backward to save memory.
        device: "auto" or "cpu".
        workers: processes that load data; 0 loads in the main process.
        memory_check: refuse a model whose parameters alone exceed the machine's memory.
    """

    epochs: Size
    max_steps: Size | None
    batch_size: Size
    accumulate: Size
    eval_batch_size: Size
    eval_every: Size
    select: Literal["best", "last"]
    schedule: Any
    aux_losses: dict[str, NonNegative] | None
    warmup: Probability
    min_lr: Fraction
    clip_grad: Positive | None
    ema: Annotated[float, Between(0, 1, above=True, below=True)] | None
    precision: Literal["no", "bf16", "fp16"]
    compile: bool
    grad_checkpointing: bool
    device: Literal["auto", "cpu"]
    workers: Count
    memory_check: bool = True

    def __post_init__(self) -> None:
        SCHEDULES.check(self.schedule, key="schedule")
        if self.batch_size % self.accumulate:
            raise OptionError("accumulate", f"{self.accumulate} does not divide batch_size={self.batch_size}.")


@dataclass(kw_only=True)
class RunConfig:
    """A whole configuration, as `config.yaml` in a run's folder holds it.

    Attributes:
        model_name: what `model=` chose, for names and tables.
        model: a model's configuration, see `models.create_model`.
        mixer: token mixer in place of the model's own, a mapping with `name` and options; None for the model's own.
        task: `name` and options of a task.
        optimizer: `name` (of timm), `lr`, `weight_decay` and further arguments of the optimizer.
        train: the section `train`.
        seed: of the weights, the data order and all other randomness.
        checkpoint: file with weights to start from; None for fresh ones.
        output_dir: where run folders are made.
        run_dir: this run's folder; None for one named after the run.
        resume: None, "auto", or a run's folder.
        tracker: Accelerate's tracker by name; None for none.
        progress: show a progress bar.
        plugins: files, folders or modules with parts from outside of the package, see `plugins.load_plugins`.
    """

    model_name: str | None
    model: dict[str, Any]
    mixer: dict[str, Any] | None
    task: dict[str, Any]
    optimizer: dict[str, Any]
    train: TrainConfig
    seed: Seed
    checkpoint: str | None
    output_dir: str
    run_dir: str | None
    resume: str | None
    tracker: str | None
    progress: bool
    plugins: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for YAML."""
        return asdict(self)


def parse(values: Mapping[str, Any]) -> RunConfig:
    """A checked configuration from a composed mapping.

    Names, types and ranges of the sections that are ours are checked here; those of models, mixers, tasks and
    optimizers where they are built.

    Raises:
        ConfigError: with the full path of the key.
    """
    values = dict(values)
    allowed = keyword_options(RunConfig)
    for key in values:
        if key not in allowed:
            raise unknown("config", key, allowed)
    for key in ("output_dir", "run_dir", "resume"):
        if isinstance(values.get(key), str):
            values[key] = os.path.expanduser(values[key])
    if not isinstance(values.get("train"), Mapping):
        raise ConfigError("train: missing, or not a mapping.")
    values["train"] = build_dataclass(TrainConfig, values["train"], key="train")
    try:
        return build_dataclass(RunConfig, values, key="config")
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("config.")) from error


def model_options(config: RunConfig, demanded: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_model` besides the model's configuration.

    Args:
        config: of the run.
        demanded: the task's `model_kwargs()`; entries that the backbone has no key for are dropped.

    Raises:
        ConfigError: the configuration of the model says something else than the data.
    """
    known = keyword_options(backbone_class(model_config(config.model)).config_class)
    for key, data, kind in (
        ("vocab_size", "tokens", "model=mamba2_tiny"),
        ("in_chans", "images", "model=caformer_s18"),
    ):
        if key in demanded and key not in known:
            backbone = model_config(config.model)["backbone"]
            raise ConfigError(
                f'model.backbone: the task "{config.task.get("name")}" gives {data}, which the backbone "{backbone}" '
                f"does not take. Choose another model, such as {kind}."
            )
    options = {key: value for key, value in demanded.items() if key in known}
    for key, value in options.items():
        given = config.model.get(key)
        pair = [given, given] if key == "image_size" and isinstance(given, int) else given
        if given is not None and pair != value:
            task = config.task.get("name")
            raise ConfigError(
                f'model.{key}: {given} disagrees with the data of the task "{task}", which have {value}. Leave it out; '
                "the task sets it" + ("; task.image_size changes it." if key == "image_size" else ".")
            )
    if config.mixer is not None:
        options["mixer"] = config.mixer
    return options


def code_version() -> str:
    """SHA-256 (hex) over the package's Python sources, names and contents.

    Tests, benchmarks and `training/ablation`, which chooses and shows runs, apart: they change no run.
    """
    digest = hashlib.sha256()
    folders = ("kernels", "mixers", "models", "tasks", "training")
    files = sorted([*PACKAGE.glob("*.py"), *(p for f in folders for p in (PACKAGE / f).rglob("*.py"))])
    for path in files:
        if path.name == "setup.py" or PACKAGE / "training" / "ablation" in path.parents:  # setup.py: in a checkout only
            continue
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def outside_code(config: RunConfig) -> list[plugins.Code]:
    """The code of the parts from outside of the package that a run uses, with all plugins that it names."""
    values = config.as_dict()
    named = {key: values[key] for key in ("model_name", "model", "mixer", "task", "optimizer")}
    return plugins.used(plugins.words(named), config.plugins)


def identity(config: RunConfig, code: str | None = None, data: Mapping[str, Any] | None = None) -> str:
    """What tells runs apart: a hash (16 hex digits) of the resolved configuration, the seed in it, code and data.

    The code is ours and that of every part from outside which the configuration names.

    Args:
        config: of the run.
        code: version of the code; by default `code_version()`.
        data: fingerprint, sizes and classes, see `identity.tells`; without them the hash is of the rest alone.
    """
    values = {k: v for k, v in config.as_dict().items() if k not in NOT_IDENTITY}
    content: dict[str, Any] = {"config": values, "code": code or code_version()}
    if data is not None:
        content["data"] = dict(data)
    outside = outside_code(config)
    if outside:
        content["outside"] = sorted(part.sha256 for part in outside)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def run_name(config: RunConfig, identifier: str) -> str:
    """Name of a run's folder: task, model, mixer, seed and the beginning of the identity."""
    mixer = "" if config.mixer is None else f"-{config.mixer.get('name')}"
    pattern = config.model.get("mixer")
    name = config.model_name
    own = model_config(name).get("mixer") if name in list_models() else None
    if config.mixer is None and isinstance(pattern, list) and pattern != own:
        mixer = "-" + "-".join(m if isinstance(m, str) else str(m.get("name")) for m in pattern)[:60]
    return f"{config.task.get('name')}-{config.model_name or 'model'}{mixer}-seed{config.seed}-{identifier[:8]}"

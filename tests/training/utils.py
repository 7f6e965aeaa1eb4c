"""Small runs for the tests of the loop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.config import RunConfig
from mixerzoo.training.loop import Interrupted, Trainer
from mixerzoo.training.run import run
from safetensors.torch import load_file

SMALL = ["model.dims=[8,16]", "train.batch_size=128", "tracker=null", "progress=false", "train.device=cpu"]


def small(output_dir: Path, *overrides: str) -> RunConfig:
    """A configuration that trains in about a second: 9 steps per epoch on digits."""
    return compose_config([*SMALL, "train.epochs=2", f"output_dir={output_dir}", *overrides])


def cut(monkeypatch: Any, config: RunConfig, step: int, number: int = signal.SIGINT) -> Path:
    """Run until a signal arrives in the given step; returns the folder."""
    original = Trainer._train_step

    def interrupted(self: Trainer, parts: Any) -> Any:
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return original(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(Interrupted) as stop:
            run(config)
    assert (stop.value.step, stop.value.number) == (step, number)
    return stop.value.folder


def tensors(folder: Path, name: str = "last/model") -> dict[str, torch.Tensor]:
    """The weights in a run's checkpoint."""
    return load_file(folder / "checkpoints" / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

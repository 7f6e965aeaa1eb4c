"""Losses that parts of a model add: summed, weighted and logged by the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import Mixer, aux_loss
from mixerzoo.mixers.base import MIXERS
from mixerzoo.tests.training.utils import small, tensors
from mixerzoo.training.run import run
from mixerzoo.training.run_folder import read_lines
from torch import Tensor, nn

NAME = "pulled"


@pytest.fixture
def pulled() -> Iterator[None]:
    class Pulled(Mixer, name=NAME):
        """No mixing; a parameter that nothing but the auxiliary loss moves, from 0 to 1."""

        source = "a test"
        aux_losses = {"pull": ("offset",)}

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            aux_loss("pull", (self.offset - 1).square())
            return x

    yield
    del MIXERS[NAME]


def trained(output: Path, *overrides: str) -> tuple[list[dict], list[float]]:
    run(small(output, f"model.mixer={NAME}", "train.epochs=2", "optimizer.lr=0.02", *overrides))
    (folder,) = output.iterdir()
    offsets = [float(v) for k, v in tensors(folder).items() if k.endswith(".offset")]
    return read_lines(folder / "metrics.jsonl"), offsets


@pytest.mark.usefixtures("pulled")
def test_weighted_and_logged(tmp_path: Path) -> None:
    lines, offsets = trained(tmp_path / "one")
    layers = len(offsets)
    assert all(0.1 < offset < 0.6 for offset in offsets), offsets  # about 18 steps of Adam at up to 0.02
    first, second = (line["aux"]["pull"] for line in lines)
    assert layers > first > second > 0
    off, still = trained(tmp_path / "off", "train.aux_losses={pull: 0.0}")
    assert still == [0.0] * layers
    assert [line["aux"]["pull"] for line in off] == pytest.approx([layers] * 2)  # logged before its weight
    # the objective is the task's loss and the weighted sum
    assert lines[0]["train_loss"] - off[0]["train_loss"] == pytest.approx(first, rel=0.2)


@pytest.mark.usefixtures("pulled")
def test_parts_of_a_batch_count_once(tmp_path: Path) -> None:
    whole, offsets = trained(tmp_path / "whole", "train.clip_grad=null")
    parts, same = trained(tmp_path / "parts", "train.clip_grad=null", "train.accumulate=2")
    assert same == pytest.approx(offsets, rel=1e-4)
    assert [line["aux"]["pull"] for line in parts] == pytest.approx([line["aux"]["pull"] for line in whole], rel=1e-4)


@pytest.mark.usefixtures("pulled")
def test_unknown_names_and_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'train.aux_losses: "pul" is not known. Did you mean "pull"'):
        trained(tmp_path / "typo", "train.aux_losses={pul: 0.5}")
    with pytest.raises(ConfigError, match=r"train.aux_losses.pull: -1 must be at least 0"):
        trained(tmp_path / "negative", "train.aux_losses={pull: -1}")
    with pytest.raises(ConfigError, match=r"train.aux_losses.pull: 'x' is not of type float"):
        trained(tmp_path / "word", "train.aux_losses={pull: x}")
    assert not any((tmp_path / name).exists() for name in ("typo", "negative", "word"))


def test_a_loss_that_the_model_leaves_out_is_refused(tmp_path: Path) -> None:
    mixer = "{name: sparsifiner, reconstruction_weight: 0.0}"
    with pytest.raises(ConfigError, match=r"train.aux_losses.connectivity: the model has added no such loss"):
        run(small(tmp_path / "off", f"model.mixer={mixer}", "train.aux_losses={connectivity: 0.5}"))
    assert not list((tmp_path / "off").glob("*"))

"""The tasks on clips through the loop, each with the model made for it."""

from __future__ import annotations

import pytest
from mixerzoo.errors import ConfigError
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.run import run

PAIRS = [
    ("change_digits", "atrous_change_tiny", "iou"),
    ("moving_digits", "lingen_tiny", "top1"),
    ("moving_digits_middle", "vfimamba_tiny", "psnr"),
]
SMALL = ["task.num_train=16", "task.num_eval=4", "train.batch_size=4", "train.max_steps=2", "train.eval_batch_size=4"]
QUIET = ["tracker=null", "progress=false", "train.device=cpu"]


@pytest.mark.parametrize(("task", "model", "metric"), PAIRS)
def test_a_short_run(task, model, metric, tmp_path):
    summary = run(compose_config([f"task={task}", f"model={model}", f"output_dir={tmp_path}", *SMALL, *QUIET]))
    assert summary["metric"] == metric
    assert summary["value"] == summary["final"][metric] >= 0
    assert summary["flops"] > 1e6
    assert summary["throughput"]["unit"] in ("pairs/s", "clips/s")


def test_the_data_decide_the_frames(tmp_path):
    """Another number of frames is another grid."""
    lines = ["task=moving_digits", "model=lingen_tiny", "task.frames=3", f"output_dir={tmp_path}", *SMALL, *QUIET]
    assert run(compose_config(lines))["parameters"] < 77_279  # a smaller position table
    with pytest.raises(ConfigError, match=r"model\.frames: 4 disagrees with the data"):
        run(compose_config([*lines, "model.frames=4"]))


def test_a_model_of_another_kind_is_refused_before_there_is_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="head=upsample"):
        run(compose_config([f"output_dir={tmp_path}", "task=change_digits", "mixer=pooling", *SMALL, *QUIET]))
    maps = ["task=digits", "model=metaformer_digits", "model.head=upsample"]
    small = [line for line in SMALL if not line.startswith("task.")]
    with pytest.raises(ConfigError, match="head=linear"):
        run(compose_config([f"output_dir={tmp_path}", *maps, *small, *QUIET]))
    assert not list(tmp_path.iterdir())

"""What a task, a mixer or a model refuses is refused before the run's folder exists."""

from pathlib import Path

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model
from mixerzoo.tasks import create_task, task_class
from mixerzoo.tests.training.utils import small
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.prepare import check, rehearse
from mixerzoo.training.run import run

LISTOPS = ["task=listops", "task.min_length=5", "task.max_length=40", "task.num_train=40", "task.num_eval=8"]
LANGUAGE = ["model.dim=16", "model.depth=1", "train.batch_size=4", "train.max_steps=1", "train.device=cpu"]
LANGUAGE += ["tracker=null", "progress=false"]


@pytest.mark.parametrize(
    "settings",
    [["train.batch_size=15", "task.mixup=0.2"], ["train.batch_size=6", "train.accumulate=2", "task.cutmix=1.0"]],
)
def test_mixing_needs_pairs(settings, tmp_path):
    config = small(tmp_path / "runs", *settings)
    for refuse in (check, run):
        with pytest.raises(ConfigError, match=r"^train\.batch_size: .*must be even"):
            refuse(config)
    assert not (tmp_path / "runs").exists()


def test_a_mask_that_a_mixer_cannot_honour(tmp_path):
    """The example has no mask, a batch has."""
    settings = ["model=transformer_tiny", "model.causal=false", *LISTOPS, *LANGUAGE, "mixer=fnet"]
    config = compose_config([*settings, f"output_dir={tmp_path / 'runs'}"])
    for refuse in (check, run):
        with pytest.raises(ValueError, match="mask"):
            refuse(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["run_dir", "output_dir"])
def test_a_place_that_is_a_file(key, tmp_path):
    (tmp_path / "file").write_text("x")
    config = small(tmp_path / "runs", f"{key}={tmp_path / 'file' / 'run'}")
    for refuse in (check, run):
        with pytest.raises(ConfigError, match=rf"{key}: .* is a file"):
            refuse(config)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_is_refused_in_its_first_step_leaves_no_folder(exists, tmp_path, monkeypatch):
    def refuse(self, model, batch):
        raise ConfigError("task.something: seen too late")

    config = small(tmp_path / "runs", f"run_dir={tmp_path / 'mine'}", "train.max_steps=1", "tracker=tensorboard")
    if exists:
        (tmp_path / "mine").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(task_class("digits"), "loss", refuse)
        with pytest.raises(ConfigError, match="seen too late"):
            run(config)
    assert not (tmp_path / "mine").exists()
    assert run(config)["steps"] == 1  # the corrected command


def test_what_was_learnt_is_kept(tmp_path, monkeypatch):
    digits = task_class("digits")
    original, seen = digits.loss, []

    def refuse(self, model, batch):
        seen.append(1)
        if len(seen) == 3:
            raise ConfigError("a bad sample")
        return original(self, model, batch)

    monkeypatch.setattr(digits, "loss", refuse)
    with pytest.raises(ConfigError, match="a bad sample"):
        run(small(tmp_path, f"run_dir={tmp_path / 'mine'}"))
    assert (tmp_path / "mine" / "config.yaml").exists()


def test_a_rehearsal_changes_nothing():
    task = create_task("digits", mixup=0.4)
    task.open()
    model = create_model("metaformer_digits", dims=[8, 16], drop_path=0.5, **task.model_kwargs())
    model.add_module("norm_of_a_user", torch.nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, torch_state = model.training, torch.random.get_rng_state()
    rehearse(model, task)
    assert model.training == state
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_running_statistics_are_put_back():
    task = create_task("digits")
    task.open()
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))
    rehearse(model, task)
    assert model[0].running_mean.tolist() == [0.0]
    assert model[0].num_batches_tracked.item() == 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["mixer=attention", "mixer.num_heads=0"], r"^mixer\.num_heads: 0 must be at least 1"),
        (["mixer=attention", "mixer.num_head=2"], r"^mixer\.num_head: .*no such option"),
        (["model.mixer={name: attention, num_heads: 0}"], r"^model\.mixer\.num_heads: 0"),
    ],
)
def test_a_mistake_has_the_key_that_was_typed(typed: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        check(small(tmp_path, *typed))

"""Command lines to configurations: what can be chosen composes, and mistakes are understood from the message."""

from pathlib import Path

import pytest
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import list_mixers, mixer_options
from mixerzoo.schema import problem
from mixerzoo.tasks import create_task, list_tasks, task_options
from mixerzoo.training import config as config_module
from mixerzoo.training.cli.compose import compose_config, sweep_jobs
from mixerzoo.training.config import CONFIGS, code_version, identity, parse
from mixerzoo.training.optim import build_optimizer
from torch import nn


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def test_defaults():
    config = compose_config()
    assert config.model_name == "metaformer_digits"
    assert config.mixer is None
    assert config.task["name"] == "digits"
    assert config.optimizer["name"] == "adamw"
    assert config.train.precision == "no"
    assert parse(config.as_dict()) == config


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_can_be_chosen(name):
    config = compose_config([f"mixer={name}"])
    assert config.mixer is not None
    assert config.mixer["name"] == name
    assert set(config.mixer) >= {"name"}
    assert set(config.mixer) - {"name"} <= set(mixer_options(name))


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_can_be_chosen(name):
    needed = [
        f"task.{key}={7 if problem(7, option.annotation) is None else chr(120)}"
        for key, option in task_options(name).items()
        if option.default is option.empty
    ]
    config = compose_config([f"task={name}", *needed])
    options = dict(config.task)
    assert create_task(options.pop("name"), **options).name == name


@pytest.mark.parametrize("name", [*names("optimizer"), "nadamw", "muon"])
def test_optimizers_can_be_chosen_and_built(name):
    config = compose_config([f"optimizer={name}"])
    assert (
        build_optimizer(nn.Sequential(nn.Linear(4, 4)), config.optimizer).param_groups[0]["lr"]
        == config.optimizer["lr"]
    )


def test_options_of_parts_that_their_files_do_not_name():
    config = compose_config(
        ["mixer=attention", "mixer.head_dim=16", "model.drop_path=0.2", "task.erase=0.5", "optimizer.eps=1e-6"]
    )
    assert config.mixer is not None
    assert config.mixer["head_dim"] == 16
    assert config.model["drop_path"] == 0.2
    assert config.task["erase"] == 0.5
    assert config.optimizer["eps"] == 1e-6


def test_a_pattern_of_mixers_goes_to_the_model():
    config = compose_config(["mixer=[conv,attention]"])
    assert config.mixer is None
    assert config.model["mixer"] == ["conv", "attention"]


def test_a_model_by_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: metaformer_digits\ndims: [8, 16]\n")
    config = compose_config([f"model={path}"])
    assert config.model_name == "mine"
    assert config.model["dims"] == [8, 16]
    assert config.model["backbone"] == "pyramid"


MISTAKES = {
    "model=poolfomer_s12": ["model", "poolfomer_s12", 'Did you mean "poolformer_s'],
    "mixer=atention": ["mixer", "atention", 'Did you mean "attention"?'],
    "task=digit": ["task", 'Did you mean "digits"?'],
    "optimizer=adam_w": ["optimizer", 'Did you mean "adamw"?'],
    "trian.epochs=3": ["trian", 'Did you mean "train'],
    "train.epoch=3": ["train.epoch:", 'Did you mean "train.epochs"?'],
    "epochs=3": ["epochs:", 'Did you mean "train.epochs"?'],
    "lr=0.1": ["lr:", 'Did you mean "optimizer.lr"?'],
    "train.epochs=many": ["train.epochs", "'many'", "int"],
    "train.compile=1.5": ["train.compile", "1.5", "bool"],
    "train.epochs=0": ["train.epochs", "at least 1"],
    "train.precision=fp8": ["train.precision", "fp8", "bf16"],
    "train.schedule=cosin": ["train.schedule", "cosin", "cosine"],
    "train.warmup=5": ["train.warmup: 5 must be", "below 1"],
    "train.ema=1": ["train.ema: 1 must be", "below 1"],
    "train.workers=-1": ["train.workers: -1 must be at least 0"],
    "train.accumulate=3": ["train.accumulate", "does not divide"],
    "seed=one": ["seed", "'one'", "int"],
    "+foo=1": ["foo", "not known"],
    "train.epochs": ["train.epochs", "key=value"],
    "train.epochs=[1": ["train.epochs"],
    "model=missing.yaml": ["model", "there is no file", "missing.yaml"],
    "task=imagefolder": ["task.root", "needed"],
    "mixer.head_dim=16": ["mixer.head_dim", "mixer=NAME"],
    "task=null": ["task", "task=NAME"],
    "optimizer=[adamw]": ["optimizer", "optimizer=NAME"],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named(text):
    with pytest.raises(ConfigError) as caught:
        compose_config([text])
    message = str(caught.value)
    for part in MISTAKES[text]:
        assert part in message, message
    assert "\n" not in message
    assert "Traceback" not in message


def test_identity_changes_with_each_of_config_code_and_seed(monkeypatch, tmp_path):
    config = compose_config()
    base = identity(config)
    assert identity(compose_config()) == base
    assert identity(compose_config(["seed=1"])) != base
    assert identity(compose_config(["train.epochs=7"])) != base
    assert identity(compose_config(["task.crop_padding=2"])) != base
    assert identity(compose_config(["mixer=attention"])) != identity(
        compose_config(["mixer=attention", "mixer.head_dim=8"])
    )
    # where it is written is not what it is
    assert identity(compose_config(["output_dir=elsewhere", "resume=auto", "tracker=null", "progress=false"])) == base

    code = code_version()
    for folder in ("kernels", "mixers", "models", "tasks", "training"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mixers" / "one.py").write_text("a = 1\n")
    monkeypatch.setattr(config_module, "PACKAGE", tmp_path)
    seen = [code, code_version()]
    (tmp_path / "mixers" / "one.py").write_text("a = 2\n")
    seen.append(code_version())
    (tmp_path / "mixers" / "one.py").rename(tmp_path / "mixers" / "two.py")
    seen.append(code_version())
    (tmp_path / "kernels" / "new.py").write_text("")
    seen.append(code_version())
    assert len(set(seen)) == 5
    assert len({identity(config, version) for version in seen}) == 5
    assert identity(config) == identity(config, seen[-1])  # the code's version is part of it by default


def test_code_version_covers_the_package():
    assert code_version() == code_version()
    assert Path(config_module.__file__).resolve().parent.parent == config_module.PACKAGE


def test_sweeps_are_expanded():
    jobs = sweep_jobs(["mixer=pooling,conv", "seed=0,1", "train.epochs=2"])
    assert jobs is not None
    assert len(jobs) == 4
    assert ["mixer=conv", "seed=1", "train.epochs=2"] in jobs
    assert sweep_jobs(["hydra/sweeper=optuna"]) is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seed=-1", "seed: -1 must be at least 0"),
        ("train.clip_grad=inf", "train.clip_grad: inf must be a finite number"),
        ("train.epochs=9223372036854775808", "train.epochs: .* and at most"),
    ],
)
def test_numbers_out_of_range_are_named(argument, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        compose_config([argument])

"""Checkpoints as they come from trainers and hubs: wrappers, prefixes, shards, folders, other sizes, missing parts."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixerzoo import ConfigError, create_model
from mixerzoo.models import model_config, save_model
from mixerzoo.models.interop.huggingface import MixerZooForCausalLM
from safetensors.torch import save_file
from torch import Tensor, nn

VISION = {
    "backbone": "pyramid",
    "dims": [8, 16],
    "depths": [1, 1],
    "mixer": "pooling",
    "stem": {"name": "conv", "kernel_size": 4, "stride": 4},
    "downsample": {"name": "conv", "kernel_size": 2, "stride": 2},
    "image_size": 32,
    "num_classes": 5,
}
LANGUAGE = {"backbone": "language", "vocab_size": 17, "dim": 16, "depth": 2, "mixer": "attention"}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = create_model(VISION)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: nn.Module, channels: int = 3) -> Tensor:
    x = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x)


class Foreign:
    """A class that no checkpoint may bring to life."""


CONTENTS = {
    "timm's trainer": lambda state: {
        "epoch": 3,
        "arch": "resnet",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1)}]},
        "version": 2,
        "args": argparse.Namespace(lr=0.1, mean=(0.5,), output=Path("out"), seed=np.int64(3)),
        "metric": np.float32(71.5),
        "history": np.arange(3),
    },
    "averaged weights first": lambda state: {
        "state_dict": {k: torch.zeros_like(v) for k, v in state.items()},
        "state_dict_ema": state,
    },
    "torch's average": lambda state: {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in state.items()}},
    "data parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: OrderedDict((f"_orig_mod.{k}", v) for k, v in state.items()),
    "compiled and parallel": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "compiled by stage": lambda state: {k.replace("stages.", "stages._orig_mod."): v for k, v in state.items()},
    "lightning": lambda state: {
        "pytorch-lightning_version": "2",
        "state_dict": {f"model.{k}": v for k, v in state.items()},
    },
    "some own prefix": lambda state: {f"encoder.trunk.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_trainers_write(kind: str, model: nn.Module, tmp_path: Path) -> None:
    torch.save(CONTENTS[kind](model.state_dict()), tmp_path / "last.pth.tar")
    again = create_model(VISION, checkpoint=tmp_path / "last.pth.tar")
    assert torch.equal(logits(again), logits(model))


def test_nothing_runs(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": model.state_dict(), "args": Foreign()}, tmp_path / "last.pth")
    with pytest.raises(ConfigError, match=r"it holds .*Foreign, which could run code"):
        create_model(VISION, checkpoint=tmp_path / "last.pth")


@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (6, 1), (1, 3), (3, 6), (2, 6), (3, 3)])
def test_other_channels(given: int, wanted: int, tmp_path: Path) -> None:
    """The same grey image in every channel gives the same logits, however many channels there are."""
    torch.manual_seed(0)
    model = create_model(VISION, in_chans=given)
    save_model(model, tmp_path / "m.safetensors")
    grey = torch.randn(2, 1, 32, 32)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = create_model(VISION, in_chans=wanted, checkpoint=tmp_path / "m.safetensors")
    said = [f"m.safetensors: made for {given} channels, the model has {wanted}: the weights of its stem are adapted."]
    assert [str(w.message) for w in seen] == said * (given != wanted)
    whole = [m.eval()(grey.expand(-1, n, -1, -1)) for m, n in ((model, given), (again, wanted))]
    torch.testing.assert_close(whole[0], whole[1])


def test_other_channels_that_do_not_divide(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(VISION, in_chans=3)
    save_model(model, tmp_path / "m.safetensors")
    old = model.stem.conv.weight
    with pytest.warns(UserWarning, match="3 channels, the model has 5"):
        new = create_model(VISION, in_chans=5, checkpoint=tmp_path / "m.safetensors").stem.conv.weight
    torch.testing.assert_close(new, old[:, [0, 1, 2, 0, 1]] * 0.6)
    with pytest.warns(UserWarning, match="3 channels, the model has 2"):
        new = create_model(VISION, in_chans=2, checkpoint=tmp_path / "m.safetensors").stem.conv.weight
    torch.testing.assert_close(new, old[:, :2] * 1.5)


@pytest.mark.parametrize("name", ["raftmlp_s", "affnet_tiny", "stripmlp_tiny_light", "vmamba_tiny", "vim_tiny"])
def test_other_channels_in_every_stem(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"num_classes": 3, "image_size": 64}
    if name == "vim_tiny":
        config |= {"depth": 1}
    else:
        config |= {"depths": [1] * len(model_config(name)["depths"])}
    torch.manual_seed(0)
    model = create_model(name, in_chans=3, **config)
    save_model(model, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="made for 3 channels, the model has 1"):
        again = create_model(name, in_chans=1, **config, checkpoint=tmp_path / "m.safetensors")
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(grey), model.eval()(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_classes_come_and_go(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m.safetensors")
    features = [create_model(VISION, num_classes=0)]
    with pytest.warns(UserWarning, match="5 classes, the model none"):
        features.append(create_model(VISION, num_classes=0, checkpoint=tmp_path / "m.safetensors"))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(features[1].eval()(x), model.forward_head(model.forward_features(x), pre_logits=True))
    save_model(features[1], tmp_path / "f.safetensors")
    with pytest.warns(UserWarning, match="no weights, the model 5 classes"):
        again = create_model(VISION, checkpoint=tmp_path / "f.safetensors")
    torch.testing.assert_close(again.eval().forward_features(x), model.forward_features(x))


def shard(state: dict[str, Tensor], folder: Path, suffix: str) -> None:
    names = sorted(state)
    parts = {f"model-{i + 1}-of-2{suffix}": {k: state[k].contiguous() for k in names[i::2]} for i in range(2)}
    for file, part in parts.items():
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    weight_map = {k: file for file, part in parts.items() for k in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_and_folders(suffix: str, model: nn.Module, tmp_path: Path) -> None:
    shard(model.state_dict(), tmp_path, suffix)
    (index,) = tmp_path.glob("*.index.json")
    for given in (tmp_path, index):
        assert torch.equal(logits(create_model(VISION, checkpoint=given)), logits(model))
    next(iter(tmp_path.glob("model-2*"))).unlink()
    with pytest.raises(ConfigError, match=r"model-2-of-2.* is not beside it"):
        create_model(VISION, checkpoint=tmp_path)


def test_a_folder_with_one_file(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not exactly one"):
        create_model(VISION, checkpoint=tmp_path)
    torch.save(model.state_dict(), tmp_path / "epoch_7.pt")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert torch.equal(logits(create_model(VISION, checkpoint=f"~/{tmp_path.name}")), logits(model))
    assert torch.equal(logits(create_model(VISION, checkpoint=f"~/{tmp_path.name}/epoch_7.pt")), logits(model))


def test_a_folder_of_our_wrapper(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapper = MixerZooForCausalLM.from_name(LANGUAGE).eval()
    wrapper.save_pretrained(tmp_path)
    again = create_model(LANGUAGE, checkpoint=tmp_path).eval()
    ids = torch.randint(0, 17, (2, 7))
    assert torch.equal(again(ids), wrapper(ids).logits)


def test_own_weights_into_another_model(model: nn.Module, tmp_path: Path) -> None:
    """What has no weights of its own differs unseen: it is said."""
    save_model(model, tmp_path / "m.safetensors")
    other = {**VISION, "mixer": {"name": "pooling", "pool_size": 5}, "norm": {"name": "group_norm", "eps": 1e-3}}
    with pytest.warns(
        UserWarning, match=r"another one: .*mixer.pool_size is 'the default' there, 5 in the model"
    ) as seen:
        create_model(other, checkpoint=tmp_path / "m.safetensors")
    assert "norm.eps is 'the default' there, 0.001 in the model" in str(seen[0].message)

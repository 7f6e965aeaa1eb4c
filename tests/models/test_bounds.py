"""Every number of every part at its edges: refused with the path of its key, or a model that computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer, list_mixers, memory, mixer_class, mixer_options
from mixerzoo.mixers.orders.orders import LEARNED
from mixerzoo.mixers.orders.paths import PATHS
from mixerzoo.models import create_model
from mixerzoo.models.parts.blocks import BLOCKS
from mixerzoo.models.parts.channel_mixers import CHANNEL_MIXERS
from mixerzoo.models.parts.heads import HEADS
from mixerzoo.models.parts.mobile_parts import FUSIONS
from mixerzoo.models.parts.norms import NORMS
from mixerzoo.models.parts.stems import STEMS
from mixerzoo.models.registry import backbone_class
from mixerzoo.schema import Parts, keyword_options, problem
from mixerzoo.tasks import create_task, list_tasks, task_options

EDGES = (math.nan, math.inf, -math.inf, -1, 0, -0.5, 1e-300, 1e38, 2**31 - 1, 2**63, 10**400)
GRIDS = {1: (12,), 2: (4, 4), 3: (2, 4, 4)}
PATCHES = {"name": "conv", "kernel_size": 4, "stride": 4, "padding": 0}
HALVES = {"name": "conv", "kernel_size": 2, "stride": 2, "padding": 0}
PYRAMID = {
    "backbone": "pyramid", "dims": [16, 32], "depths": [1, 1], "mixer": "pooling", "stem": PATCHES,
    "downsample": HALVES, "image_size": 32, "num_classes": 3, "channel_mixer": {"name": "mlp", "ratio": 2},
}  # fmt: skip
ISOTROPIC = {
    "backbone": "isotropic", "dim": 16, "depth": 2, "mixer": "attention", "image_size": 16, "patch_size": 4,
    "num_classes": 3,
}  # fmt: skip
LANGUAGE = {"backbone": "language", "vocab_size": 11, "dim": 16, "depth": 2, "mixer": "attention"}
SLOTS = {
    "norm": NORMS, "channel_mixer": CHANNEL_MIXERS, "stem": STEMS, "downsample": STEMS, "head": HEADS,
    "fusion": FUSIONS, "block": BLOCKS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """What passes the bounds and is larger than this must not be tried."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 2 * 10**9)


def edges(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(option, value) for every number among the options that the bounds let through; the others name their option."""
    for option, parameter in options.items():
        hint = parameter.annotation
        if not any(problem(value, hint) is None for value in (1, 3, 0.5)) or problem("", hint) is None:
            continue
        refused = [value for value in EDGES if problem(value, hint) is not None]
        assert math.isnan(refused[0]), option  # NaN is a number that no option takes
        for value in EDGES:
            if value not in refused and not math.isnan(value):
                yield option, value


def computes(model: torch.nn.Module, x: torch.Tensor, what: Any) -> None:
    y = model(x)
    assert y.isfinite().all(), f"{what}: not finite"
    y.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), f"{what}: gradient not finite"


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result and no message, or None and the message of what was refused."""
    try:
        return call(), ""
    except ConfigError as error:
        return None, str(error)


def tried(config: dict[str, Any], what: Any) -> None:
    """Refused with the path of a key of the model, or a model that computes."""
    torch.manual_seed(0)
    model, refusal = attempt(lambda: create_model(config))
    assert refusal.startswith("model") or model is not None, f"{what}: {refusal}"
    size = config.get("image_size", 8)
    if model is None:
        return
    if config["backbone"] == "language":
        computes(model, torch.randint(0, model.vocab_size, (2, 8)), what)
    elif isinstance(size, int) and size < 1000 and "frames" not in config:
        computes(model, torch.randn(2, config.get("in_chans", 3), size, size), what)


@pytest.mark.parametrize("name", list_mixers())
def test_mixers(name):
    cls = mixer_class(name)
    causal = cls.causal == "always"
    grid = GRIDS[1 if causal else 2 if 2 in cls.axes else cls.axes[-1]]
    for option, value in edges(mixer_options(name)):
        given = {**cls.requires.get(option, {}), option: value}
        torch.manual_seed(0)
        mixer, refusal = attempt(lambda given=given: create_mixer(name, 16, grid=grid, causal=causal, **given))
        assert refusal.startswith("mixer") or mixer is not None, f"{option}={value}: {refusal}"
        if mixer is None:
            continue
        y, refusal = attempt(lambda mixer=mixer: mixer(torch.randn(2, *grid, 16)))
        if y is None:
            assert "tokens are more than" in refusal, f"{option}={value}: {refusal}"
            continue
        assert y.isfinite().all(), f"{option}={value}"
        if y.requires_grad:
            y.square().mean().backward()
        bad = [k for k, p in mixer.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not bad, f"{option}={value}: gradients of {bad}"


@pytest.mark.parametrize("config", [PYRAMID, ISOTROPIC, LANGUAGE], ids=lambda c: c["backbone"])
def test_backbones(config):
    for option, value in edges(keyword_options(backbone_class(config).config_class)):
        tried({**config, option: value}, (option, value))


@pytest.mark.parametrize("slot", SLOTS)
def test_parts(slot):
    parts: Parts = SLOTS[slot]
    for name, part in parts.entries.items():
        for option, value in edges(keyword_options(part, parts.reserved)):
            tried({**PYRAMID, slot: {"name": name, option: value}}, (name, option, value))


def test_orders():
    for parts in (PATHS, LEARNED):
        for name, part in parts.entries.items():
            for option, value in edges(keyword_options(part, parts.reserved)):
                order = {"name": name, option: value}
                tried({**PYRAMID, "mixer": {"name": "attention", "order": order}}, (name, option, value))


@pytest.mark.parametrize("name", list_tasks())
def test_tasks(name):
    """Constructors touch no file; what they refuse has its path."""
    missing = {o: p.annotation for o, p in task_options(name).items() if p.default is p.empty}
    needed = {option: "x" if problem("x", hint) is None else 7 for option, hint in missing.items()}
    for option, value in edges(task_options(name)):
        if value not in (2**31 - 1, 1e38):  # sizes of data that are only made when a task is opened
            given = {**needed, option: value}
            task, refusal = attempt(lambda given=given: create_task(name, **given))
            assert task is not None or refusal.startswith("task."), f"{option}={value}: {refusal}"


REFUSED = [
    ({**LANGUAGE, "init_std": 0}, "model.init_std"), ({**PYRAMID, "drop_path": -1}, "model.drop_path"),
    ({**PYRAMID, "drop_path": 2}, "model.drop_path"), ({**PYRAMID, "num_classes": -1}, "model.num_classes"),
    ({**ISOTROPIC, "patch_size": 0}, "model.patch_size"),
    ({**PYRAMID, "norm": {"name": "layer_norm", "eps": -1}}, "model.norm.eps"),
    ({**LANGUAGE, "mixer": {"name": "attention", "rope_theta": 0}}, "model.mixer.rope_theta"),
    ({**LANGUAGE, "mixer": ["mamba", {"name": "attention", "head_dim": 0}]}, "model.mixer[1].head_dim"),
    ({**LANGUAGE, "mixer": {"name": "attention", "num_heads": 3, "num_kv_heads": 2}}, "model.mixer.num_kv_heads"),
    ({**PYRAMID, "mixer": ["pooling", {"name": "attention", "num_heads": 10_000_000}]}, "model.mixer[1]"),
    ({**PYRAMID, "channel_mixer": {"name": "selective_channel", "width": 7}}, "model.channel_mixer.width"),
    ({**PYRAMID, "channel_mixer": ["mlp", {"name": "mlp", "act": "gelo"}]}, "model.channel_mixer[1].act"),
    ({**PYRAMID, "head": {"name": "linear", "norm": {"name": "layer_norm", "eps": 2}}}, "model.head.norm.eps"),
    ({"backbone": {}}, "model.backbone"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "path"), REFUSED, ids=[path for _, path in REFUSED])
def test_the_path_is_whole(config, path):
    with pytest.raises(ConfigError) as error:
        create_model(config)
    assert str(error.value).startswith(f"{path}: ")


def test_a_mixers_arguments_are_checked_too():
    for given in ({"grid": True}, {"grid": (0, 4)}, {"layer_index": -1}, {"num_layers": 0}):
        with pytest.raises(ConfigError, match=rf"^mixer\.{next(iter(given))}: "):
            create_mixer("pooling", 16, **given)


def test_memory_check(monkeypatch):
    """Refused as a whole where no single layer is too large, and let through on demand."""
    config = {**LANGUAGE, "depth": 30, "dim": 256, "mixer": "attention"}
    monkeypatch.setattr(memory, "machine_memory", lambda: 10**7)
    with pytest.raises(ConfigError, match=r"^model.*memory_check=false"):
        create_model(config)
    assert create_model(config, memory_check=False).num_features == 256
    with torch.device("meta"):
        create_model(config)


def test_what_a_block_does_not_take_is_refused():
    class Bare(torch.nn.Module):
        def __init__(self, dim: int, *, mixer: Any, norm: Any = "layer_norm", channel_mixer: Any = None) -> None:
            super().__init__()

    BLOCKS.register("bare")(Bare)
    try:
        assert create_model({**PYRAMID, "block": "bare"})
        for option, value in (("layer_scale", 0.1), ("res_scale", 1.0), ("drop_path", 0.1)):
            with pytest.raises(ConfigError, match=rf'^model\.{option}: .* the block "bare" does not take it'):
                create_model({**PYRAMID, "block": "bare", option: value})
    finally:
        del BLOCKS._entries["bare"]


@pytest.mark.parametrize("name", ["mamba_tiny", "transformer_tiny", "deltanet_tiny"])
def test_layer_scale_reaches_language_models(name):
    with torch.device("meta"):
        model = create_model(name, layer_scale=0.1)
    assert "blocks.0.layer_scale1" in dict(model.named_parameters())

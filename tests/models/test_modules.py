"""One model of each family as a module of PyTorch: hooks, adapters (ours and peft's), copies, quantisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo import create_model, list_models
from mixerzoo.contract import modules
from mixerzoo.contract.tools import perturbed
from mixerzoo.models import model_config
from mixerzoo.tests.models.test_as_modules import VISION
from torch import Tensor, nn

IMAGES = {"num_classes": 3}
TEXT = {"dim": 32, "depth": 2, "vocab_size": 20}
CLIPS = {"depth": 2, "dim": 16, "image_size": 8}
# with the models of `test_as_modules`, one of every family
MODELS = {
    "metaformer_digits": {**IMAGES, "in_chans": 1, "image_size": 8},
    "metaformer_fashion": {**IMAGES, "in_chans": 1, "image_size": 8},
    "gfnet_ti": {**IMAGES, "image_size": 32, "dim": 32, "depth": 2},
    "vim_small": {**IMAGES, "image_size": 32, "dim": 32, "depth": 2},
    "atrousmamba_tiny": {**IMAGES, "image_size": 32, "dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "atrous_change_tiny": {"image_size": 16, "dims": [8, 8, 16, 16], "in_chans": 1},
    "lingen_tiny": {**CLIPS, "in_chans": 1, "num_classes": 3},
    "vfimamba_tiny": {**CLIPS, "in_chans": 1},
    "transformer_tiny": TEXT,
    "mamba_tiny": TEXT,
    "mamba2_tiny": TEXT,
    "hybrid_tiny": {**TEXT, "depth": 4},
    "gla_tiny": TEXT,
    "retnet_tiny": TEXT,
    "deltanet_tiny": TEXT,
    "hyena_tiny": TEXT,
    "fnet_tiny": TEXT,
    "ponet_tiny": TEXT,
}


def family(name: str) -> tuple[str, frozenset[str]]:
    """What a model is made of: its backbone, its mixers and their decays and orders."""
    config = model_config(name)
    mixers = config["mixer"] if isinstance(config["mixer"], list) else [config["mixer"]]
    specs = [m if isinstance(m, dict) else {"name": m} for m in mixers]
    return config["backbone"], frozenset(f"{m['name']} {m.get('decay', '')} {m.get('order', '')}" for m in specs)


def test_every_family_is_here_or_among_those_of_the_other_file() -> None:
    tested = {family(name) for name in (*MODELS, *VISION)}
    assert {name for name in list_models() if family(name) not in tested} == set()


def case(name: str) -> tuple[nn.Module, Tensor]:
    options: dict[str, Any] = MODELS[name]
    torch.manual_seed(0)
    model = perturbed(create_model(name, **options), std=0.05).eval()
    if "vocab_size" in options:
        return model, torch.arange(12).view(2, 6)
    side, frames = options["image_size"], getattr(model.config, "frames", None)
    return model, torch.randn(2, options.get("in_chans", 3), *((frames,) if frames else ()), side, side)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_and_adapters(name: str) -> None:
    model, x = case(name)
    modules.check_hooks(model, x)
    modules.check_adapters(model, x)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_quantisation(name: str) -> None:
    model, x = case(name)
    modules.check_copies(model, x)
    modules.check_functional_call(model, x)
    modules.check_parametrize(model, x)
    modules.check_quantised(model, x)


@pytest.mark.parametrize("name", ["metaformer_digits", "transformer_tiny", "mamba2_tiny"])
def test_peft_trains_every_adapter(name: str) -> None:
    peft = pytest.importorskip("peft")
    model, x = case(name)
    layers = [n for n in modules.linears(model) if "mixer" in n]  # token and channel mixers
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)).eval()
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(x)
    y = adapted(x)
    assert (y - plain).abs().max() > 1e-3
    y.square().sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(grads) == 2 * len(layers) > 0
    assert all(g is not None and g.abs().max() > 0 for g in grads.values()), grads
    with torch.no_grad():
        torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=1e-3, atol=1e-4)

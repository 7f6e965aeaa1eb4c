"""One model of each family as a module of PyTorch: hooks, adapters (ours and peft's), copies, quantisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo import create_model
from mixerzoo.contract import modules
from mixerzoo.contract.tools import perturbed
from torch import Tensor, nn

IMAGES = {"num_classes": 3}
TEXT = {"dim": 32, "depth": 2, "vocab_size": 20}
MODELS = {
    "metaformer_digits": {**IMAGES, "in_chans": 1, "image_size": 8},
    "gfnet_ti": {**IMAGES, "image_size": 32, "dim": 32, "depth": 2},
    "vim_small": {**IMAGES, "image_size": 32, "dim": 32, "depth": 2},
    "transformer_tiny": TEXT,
    "mamba2_tiny": TEXT,
    "gla_tiny": TEXT,
}


def case(name: str) -> tuple[nn.Module, Tensor]:
    options: dict[str, Any] = MODELS[name]
    torch.manual_seed(0)
    model = perturbed(create_model(name, **options), std=0.05).eval()
    if "vocab_size" in options:
        return model, torch.arange(12).view(2, 6)
    side = options["image_size"]
    return model, torch.randn(2, options.get("in_chans", 3), side, side)


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

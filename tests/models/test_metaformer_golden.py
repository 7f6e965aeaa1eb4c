"""Whole models and blocks of the MetaFormer family equal the official code, forward and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.local.conv import SeparableConv
from mixerzoo.models import build_model, model_config
from mixerzoo.models.conversion.layouts import layouts
from mixerzoo.models.conversion.metaformer import convert_blocks
from mixerzoo.models.parts.blocks import MetaFormerBlock
from mixerzoo.models.registry import apply_overrides
from mixerzoo.tests.utils import Golden, check_golden, load_golden
from torch import Tensor, nn


def small(name: str, golden: Golden, **changes: Any) -> dict[str, Any]:
    """The configuration of a published model with the fixture's widths and depths."""
    kwargs = golden.kwargs
    sizes = {
        "dims": kwargs.get("dims", kwargs.get("embed_dims")),
        "depths": kwargs.get("depths", kwargs.get("layers")),
        "num_classes": kwargs["num_classes"],
        "image_size": list(golden["input"].shape[2:]),
    }
    return apply_overrides(model_config(name), {**sizes, **changes})


def convert(tensors: Mapping[str, Tensor], config: dict[str, Any], layout: str) -> Mapping[str, Tensor]:
    return next(known for known in layouts() if known.name == layout).convert(tensors, config)


WHOLE = [
    ("metaformer_poolformer", "poolformer_s12", "timm metaformer"),
    ("metaformer_poolformerv2", "poolformerv2_s12", "timm metaformer"),
    ("metaformer_convformer", "convformer_s18", "timm metaformer"),
    ("metaformer_caformer", "caformer_s18", "timm metaformer"),
    ("poolformer_model_official", "poolformer_s12", "official PoolFormer"),
    ("metaformer_convformer_official", "convformer_s18", "official MetaFormer baselines"),
    ("metaformer_caformer_official", "caformer_s18", "official MetaFormer baselines"),
    ("metaformer_identityformer", "identityformer_s12", "official MetaFormer baselines"),
    ("metaformer_randformer", "randformer_s12", "official MetaFormer baselines"),
]


@pytest.mark.parametrize(("fixture", "name", "layout"), WHOLE, ids=[w[0] for w in WHOLE])
def test_model_equals_official(fixture: str, name: str, layout: str) -> None:
    golden = load_golden(fixture)
    config = small(name, golden)
    if "head_dim" in golden.kwargs:
        attention = {"name": "attention", "head_dim": golden.kwargs["head_dim"]}
        config["mixer"] = ["conv", "conv", attention, attention]
    known = next(k for k in layouts() if k.name == layout)
    found = next(k for k in layouts() if k.matches(set(golden.params), config))
    assert found is known, f"told apart as {found.name}"
    model = build_model(apply_overrides(config, known.changes(config)))
    check_golden(golden, model, lambda p: convert(p, config, layout))


class NCHW(nn.Module):
    """Channels-first in and out around a channels-last module, for the fixtures' layout."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def inner(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{k}": v for k, v in state.items()}


def test_pooling_equals_timm() -> None:
    golden = load_golden("poolformer_pooling")
    channels = golden["input"].shape[1]
    mixer = create_mixer("pooling", channels, pool_size=golden.kwargs["pool_size"])
    check_golden(golden, NCHW(mixer), lambda p: inner(p))


def test_separable_conv_equals_timm() -> None:
    golden = load_golden("metaformer_sepconv")
    mixer = create_mixer("conv", golden.kwargs["dim"])
    check_golden(golden, NCHW(mixer), lambda p: inner(SeparableConv.convert_official(p)))


def test_random_mixing_equals_official() -> None:
    golden = load_golden("randformer_mixing")
    mixer = create_mixer("random", golden["input"].shape[-1], grid=tuple(golden["input"].shape[1:3]))
    check_golden(golden, mixer, type(mixer).convert_official)


@pytest.mark.parametrize("version", [1, 2])
def test_block_equals_official(version: int) -> None:
    golden = load_golden("poolformer_block" if version == 1 else "poolformerv2_block")
    dim = golden.kwargs["dim"]
    config = model_config("poolformer_s12" if version == 1 else "poolformerv2_s12")
    block = MetaFormerBlock(
        dim,
        mixer=create_mixer("pooling", dim),
        norm=config["norm"],
        channel_mixer=config["channel_mixer"],
        layer_scale=config.get("layer_scale"),
        res_scale=1.0 if version == 2 else None,
    )
    prefix = "stages.0.blocks.0."

    def ours(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = convert_blocks({prefix + k: v for k, v in params.items()}, ["pooling"])
        return inner({k.removeprefix(prefix): v for k, v in named.items()})

    check_golden(golden, NCHW(block), ours)


def test_eps_of_the_mlp_head_follows_the_source() -> None:
    """Official 1e-5, timm 1e-6: seen on small features."""
    config = model_config("caformer_s18")
    assert build_model(apply_overrides(config, {"num_classes": 2})).head.fc_norm.eps == 1e-5
    timm_layout = next(k for k in layouts() if k.name == "timm metaformer")
    assert timm_layout.changes(config)["head"]["eps"] == 1e-6

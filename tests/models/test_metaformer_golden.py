"""Whole models and blocks of the MetaFormer family equal the official code, forward and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.local.conv import SeparableConv
from mixerzoo.models import build_model, model_config
from mixerzoo.models.conversion.layouts import layouts
from mixerzoo.models.conversion.metaformer import convert_timm_metaformer
from mixerzoo.models.parts.blocks import MetaFormerBlock
from mixerzoo.models.registry import apply_overrides
from mixerzoo.tests.utils import Golden, check_golden, load_golden
from torch import Tensor, nn

MIXERS = {"Pooling": "pooling", "SepConv": "conv", "Attention": "attention", "Identity": "identity"}


def mixer(official: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Ours, with its options, for the name of an official class."""
    name = official.rpartition(".")[2]
    if name.startswith("RandomMixing"):
        return {"name": "random"}
    own = {"Attention": "head_dim", "Pooling": "pool_size"}.get(name, "")
    return {"name": MIXERS[name], **({own: kwargs[own]} if own in kwargs else {})}


def small(name: str, golden: Golden) -> dict[str, Any]:
    """The configuration of a published model with the fixture's widths, depths, mixers and ratios."""
    kwargs, config = golden.kwargs, model_config(name)
    sizes: dict[str, Any] = {
        "dims": kwargs.get("dims", kwargs.get("embed_dims")),
        "depths": kwargs.get("depths", kwargs.get("layers")),
        "num_classes": kwargs["num_classes"],
        "image_size": list(golden["input"].shape[2:]),
    }
    official = kwargs.get("token_mixers", "Pooling")
    count = len(sizes["dims"])
    sizes["mixer"] = [mixer(m, kwargs) for m in ([official] * count if isinstance(official, str) else official)]
    ratios = set(kwargs.get("mlp_ratios", ())) or {kwargs.get("mlp_ratio", config["channel_mixer"]["ratio"])}
    assert len(ratios) == 1, "channel mixers are the same in all stages"
    sizes["channel_mixer"] = {**config["channel_mixer"], "ratio": float(*ratios)}
    return apply_overrides(config, sizes)


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
    pooling = create_mixer("pooling", channels, pool_size=golden.kwargs["pool_size"])
    check_golden(golden, NCHW(pooling), lambda p: inner(p))


def test_separable_conv_equals_timm() -> None:
    golden = load_golden("metaformer_sepconv")
    kwargs = golden.kwargs
    options = {k: kwargs[k] for k in ("expansion_ratio", "kernel_size", "bias") if k in kwargs}
    assert kwargs.get("padding", 3) == kwargs.get("kernel_size", 7) // 2, "the grid would change"
    conv = create_mixer("conv", kwargs["dim"], **options)
    check_golden(golden, NCHW(conv), lambda p: inner(SeparableConv.convert_official(p)))


def test_random_mixing_equals_official() -> None:
    golden = load_golden("randformer_mixing")
    random = create_mixer("random", golden["input"].shape[-1], grid=tuple(golden["input"].shape[1:3]))
    check_golden(golden, random, type(random).convert_official)


@pytest.mark.parametrize("version", [1, 2])
def test_block_equals_official(version: int) -> None:
    golden = load_golden("poolformer_block" if version == 1 else "poolformerv2_block")
    kwargs = golden.kwargs
    dim, published = kwargs["dim"], model_config("poolformer_s12" if version == 1 else "poolformerv2_s12")
    options = mixer(kwargs.get("token_mixer", "Pooling"), kwargs)
    name = options.pop("name")
    channel_mixer = {**published["channel_mixer"], "ratio": kwargs.get("mlp_ratio", 4.0)}
    if version == 2:
        acts = {"StarReLU": "star_relu", "GELU": "gelu", "ReLU": "relu"}
        channel_mixer |= {"act": acts[kwargs["mlp_act"].rpartition(".")[2]], "bias": kwargs["mlp_bias"]}
    layer_scale = kwargs["layer_scale_init_value"] if version == 2 else published["layer_scale"]
    block = MetaFormerBlock(
        dim,
        mixer=create_mixer(name, dim, **options),
        norm=published["norm"],
        channel_mixer=channel_mixer,
        layer_scale=layer_scale,
        res_scale=kwargs.get("res_scale_init_value"),
    )
    prefix = "stages.0.blocks.0."

    def ours(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = convert_timm_metaformer({prefix + k: v for k, v in params.items()}, {"depths": [1], "mixer": name})
        return inner({k.removeprefix(prefix): v for k, v in named.items()})

    check_golden(golden, NCHW(block), ours)


def test_eps_of_the_mlp_head_follows_the_source() -> None:
    """Official 1e-5, timm 1e-6: seen on small features."""
    config = model_config("caformer_s18")
    assert build_model(apply_overrides(config, {"num_classes": 2})).head.fc_norm.eps == 1e-5
    timm_layout = next(k for k in layouts() if k.name == "timm metaformer")
    assert timm_layout.changes(config)["head"]["eps"] == 1e-6

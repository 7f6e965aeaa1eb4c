"""Models by name, file and mapping; errors that name the key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo import ConfigError, Mixer, create_mixer, create_model, list_mixers, list_models, resize_grid
from mixerzoo.mixers.base import MIXERS
from mixerzoo.models import model_config
from mixerzoo.models.create import on_meta
from mixerzoo.models.registry import BACKBONES, apply_overrides
from mixerzoo.schema import Size
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "backbone": "pyramid",
    "dims": [16, 32],
    "depths": [1, 2],
    "mixer": "pooling",
    "stem": {"name": "conv", "kernel_size": 3, "stride": 2, "padding": 1},
    "downsample": {"name": "conv", "kernel_size": 3, "stride": 2, "padding": 1},
    "num_classes": 4,
    "image_size": 16,
}
ISOTROPIC: dict[str, Any] = {
    "backbone": "isotropic",
    "dim": 32,
    "depth": 2,
    "mixer": "pooling",
    "patch_size": 2,
    "num_classes": 4,
    "image_size": 16,
}
VISION = list_mixers(axes=2, causal=False)


@pytest.mark.parametrize("name", list_models())
def test_every_config_builds(name: str) -> None:
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert model_config(name)["backbone"] in BACKBONES.entries


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("base", [TINY, ISOTROPIC], ids=["pyramid", "isotropic"])
def test_every_image_mixer_in_both_backbones(name: str, base: dict[str, Any]) -> None:
    size = [16, 24]
    config = {**base, "image_size": size, **({"dims": [32, 64]} if "dims" in base else {})}
    model = create_model(config, mixer=name)
    y = model(torch.randn(2, 3, *size))
    assert y.shape == (2, 4)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    resize_grid(model, (24, 32))
    assert model.eval()(torch.randn(1, 3, 24, 32)).isfinite().all()


def test_by_name_path_and_mapping(tmp_path: Path) -> None:
    torch.manual_seed(0)
    by_name = create_model("poolformer_s12", num_classes=3)
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: pyramid\ndims: [8]\ndepths: [1]\nmixer: pooling\nnum_classes: 2\n")
    assert create_model(file)(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    file.write_text("base: poolformer_s12\nnum_classes: 2\n")
    assert model_config(file)["dims"] == [64, 128, 320, 512]
    by_base = create_model({"base": "poolformer_s12", "num_classes": 3})
    assert [p.shape for p in by_name.parameters()] == [p.shape for p in by_base.parameters()]


def test_overrides_and_another_mixer() -> None:
    model = create_model(TINY, mixer={"name": "attention", "head_dim": 8}, drop_path=0.1, **{"head.dropout": 0.2})
    assert model.head.dropout == 0.2
    assert {m.name for m in model.modules() if isinstance(m, Mixer)} == {"attention"}
    mixed = create_model(TINY, mixer=["identity", "attention"])
    assert [s.blocks[0].mixer.name for s in mixed.stages] == ["identity", "attention"]
    gray = create_model(TINY, in_chans=1)
    assert gray(torch.randn(1, 1, 16, 16)).shape == (1, 4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"mixer": "poling"}, r'model\.mixer: "poling" is not known\. Did you mean "pooling"\?'),
    ({"mixer": ["pooling", "attn"]}, r'model\.mixer\[1\]: "attn"'),
    ({"mixer": {"name": "pooling", "pool": 3}}, r'model\.mixer\.pool: .*Did you mean "pool_size"\?'),
    ({"mixer": {"name": "pooling", "pool_size": "3"}}, r"model\.mixer\.pool_size: '3' is not of type int"),
    ({"mixer": {"pool_size": 3}}, r"model\.mixer: .*`name`"),
    ({"mixer": ["pooling"] * 3}, r"model\.mixer: 3 entries for 2 stages"),
    ({"norm": "layernorm"}, r'model\.norm: "layernorm" is not known\. Did you mean "layer_norm"\?'),
    ({"channel_mixer": {"name": "mlp", "act": "gelo"}}, r'act: "gelo" is not known\. Did you mean "gelu"\?'),
    ({"channel_mixer": {"name": "mlp", "ration": 2}}, r'model\.channel_mixer\.ration: .*Did you mean "ratio"\?'),
    ({"head": {"name": "linear", "pool": "mean"}}, r'head\.pool: "mean"'),
    ({"block": "metafromer"}, r'model\.block: "metafromer".*Did you mean "metaformer"\?'),
    ({"depths": 2}, r"model\.depths: 2 is not of type list\[int"),
    ({"dims": [16]}, r"model\.dims: 1 widths for 2 stages"),
    ({"downsample": None}, r"model\.downsample: needed"),
    ({"image_size": 0}, r"model\.image_size: 0 must be at least 1"),
    (
        {"stem": {"name": "conv", "kernel_size": 4, "stride": 4, "padding": 0}, "image_size": 30},
        r"30x30 cannot be divided",
    ),
    ({"backbone": "pyramyd"}, r'model\.backbone: "pyramyd" is not known\. Did you mean "pyramid"\?'),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(b[0])[:40] for b in BAD])
def test_a_mistake_is_named_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model({**TINY, **changes})


def test_unknown_key_and_model() -> None:
    with pytest.raises(ConfigError, match=r'model\.dimz: .*Did you mean "dims"\?'):
        create_model({**TINY, "dimz": [1]})
    with pytest.raises(ConfigError, match=r'"drop_pth" is not known\. Did you mean "drop_path"\?'):
        create_model(TINY, drop_pth=0.1)
    with pytest.raises(ConfigError, match=r'model: "poolformer_s13" is not known\. Did you mean "poolformer_s12"\?'):
        create_model("poolformer_s13")
    with pytest.raises(ConfigError, match="cannot be read"):
        create_model("nowhere/model.yaml")
    with pytest.raises(ConfigError, match=r"model\.head: 3 has no entries"):
        apply_overrides({"head": 3}, {"head.pool": "avg"})
    with pytest.raises(ConfigError, match="shape"):
        create_model(TINY)(torch.randn(1, 1, 16, 16))


def test_a_backbone_is_found_like_any_part() -> None:
    @dataclass(kw_only=True)
    class OneLinearConfig:
        dim: Size
        num_classes: Size = 2
        in_chans: Size = 3

    class OneLinear(nn.Linear):
        config_class = OneLinearConfig

        def __init__(self, config: OneLinearConfig) -> None:
            super().__init__(config.in_chans * config.dim, config.num_classes)

    BACKBONES.register("one_linear_for_a_test")(OneLinear)
    try:
        assert create_model({"backbone": "one_linear_for_a_test", "dim": 4}).weight.shape == (2, 12)
        with pytest.raises(ConfigError, match=r"^model\.dim: 0 must be at least 1"):
            create_model({"backbone": "one_linear_for_a_test", "dim": 0})
    finally:
        del BACKBONES.entries["one_linear_for_a_test"]


def test_mixers_keep_their_initial_values() -> None:
    """A backbone that initialised everything alike would overwrite this one."""

    class Marked(Mixer, name="marked_for_test"):
        """Has an initial value of its own."""

        source = "none"

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.fc = nn.Linear(dim, dim)
            nn.init.constant_(self.fc.weight, 7.0)
            nn.init.constant_(self.fc.bias, 3.0)

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return self.fc(x)

        def no_weight_decay(self) -> set[str]:
            return {"fc.weight"}

    try:
        for base in (TINY, ISOTROPIC):
            model = create_model(base, mixer="marked_for_test")
            mixers = {n: m for n, m in model.named_modules() if isinstance(m, Marked)}
            assert mixers
            exempt = model.no_weight_decay()
            for name, mixer in mixers.items():
                assert (mixer.fc.weight == 7).all()
                assert (mixer.fc.bias == 3).all()
                assert f"{name}.fc.weight" in exempt
                assert f"{name}.fc.bias" not in exempt  # the mixer says what is exempt, and it named the weight alone
    finally:
        del MIXERS["marked_for_test"]


def test_names_are_unique_and_options_keyword_only() -> None:
    with pytest.raises(ConfigError, match='mixer "pooling" exists already'):

        class Again(Mixer, name="pooling"):
            """A second one of that name."""

    with pytest.raises(ConfigError, match='"size" must be keyword-only'):

        class Positional(Mixer, name="positional_for_test"):
            """Options that could be given in any order."""

            def __init__(self, dim: int, size: int = 3) -> None:
                super().__init__()

    assert "positional_for_test" not in MIXERS


def test_capabilities_select() -> None:
    assert "pooling" in list_mixers(causal=True, streams=True)
    assert set(list_mixers(needs_grid=True)) < set(list_mixers())
    with pytest.raises(ConfigError, match='"stream" is not known'):
        list_mixers(stream=True)
    with pytest.raises(ConfigError, match=r"mixer\.dim: 0 must be at least 1"):
        create_mixer("pooling", 0)


def test_star_relu_mlp_equals_its_definition() -> None:
    from mixerzoo.models.parts.channel_mixers import Mlp

    mlp = Mlp(8, act="star_relu", bias=True)
    with torch.no_grad():
        mlp.act.scale.fill_(0.7)
        mlp.act.bias.fill_(-0.4)
    x = torch.randn(2, 5, 8)
    expected = mlp.fc2(0.7 * torch.relu(mlp.fc1(x)) ** 2 - 0.4)
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp.fc2(mlp.act(mlp.fc1(x))), expected)


def test_initial_weights_follow_init_std():
    torch.manual_seed(0)
    narrow = create_model("metaformer_fashion", num_classes=0)
    weight = narrow.stages[1].blocks[0].channel_mixer.fc1.weight
    assert float(weight.detach().std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    usual = create_model("metaformer_fashion", num_classes=0, init_std=0.02)
    assert float(usual.stages[1].blocks[0].channel_mixer.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    mixers = [m.stages[1].blocks[0].mixer.qkv.weight for m in (narrow, usual)]
    first, second = (float(m.detach().std()) for m in mixers)
    assert first == pytest.approx(second, rel=0.1)  # mixers own their initial values

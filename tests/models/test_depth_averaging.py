"""MambaMixer: the selective channel mixer, averages of earlier layers in both backbones, and ViM2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model
from mixerzoo.models.create import on_meta
from mixerzoo.models.parts.channel_mixers import CHANNEL_MIXERS
from torch import nn
from torch.nn import functional as F

PYRAMID: dict[str, Any] = {
    "backbone": "pyramid", "dims": [8, 16], "depths": [2, 3], "mixer": "conv", "image_size": 16, "num_classes": 3,
    "stem": {"name": "conv", "kernel_size": 2, "stride": 2, "padding": 0},
    "downsample": {"name": "conv", "kernel_size": 2, "stride": 2, "padding": 0}, "init_std": None,
}  # fmt: skip
ISOTROPIC: dict[str, Any] = {
    "backbone": "isotropic", "dim": 8, "depth": 3, "mixer": "pooling", "patch_size": 4, "image_size": 16,
    "num_classes": 3, "init_std": None,
}  # fmt: skip


def build(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return CHANNEL_MIXERS.build({"name": "selective_channel", **options}, 12, key="channel_mixer")


def test_channel_mixer_by_its_definition() -> None:
    """Group by group and step by step, forwards and backwards."""
    module = build(width=4, d_state=3)
    x = torch.randn(5, 12)
    mixer = module.mixer
    u, z = F.linear(x.view(5, 3, 4), mixer.enter.weight).chunk(2, -1)
    total = torch.zeros_like(u)
    for k, one in enumerate(mixer.mixers):
        tokens = u.flip(1) if k else u
        padded = F.pad(tokens, (0, 0, 3, 0))
        v = sum(padded[:, j : j + 3] * one.conv1d.weight[:, j] for j in range(4)) + one.conv1d.bias
        v = F.silu(v)
        r, b, c = F.linear(v, one.x_proj.weight).split((1, 3, 3), -1)
        delta = F.softplus(F.linear(r, one.dt_proj.weight, one.dt_bias))
        state, out = torch.zeros(5, 8, 3), []
        for t in range(3):
            step = delta[:, t, :, None]
            state = torch.exp(-step * one.A_log.exp()) * state + step * b[:, t, None] * v[:, t, :, None]
            out.append((state * c[:, t, None]).sum(-1) + one.D * v[:, t])
        y = torch.stack(out, 1)
        total = total + (y.flip(1) if k else y) * F.silu(z)
    expected = F.linear(total, mixer.leave.weight).view(5, 12)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_channel_mixer_contract() -> None:
    module = build(width=3)
    x = torch.randn(2, 3, 5, 12, requires_grad=True)
    y = module(x)
    torch.testing.assert_close(module(x[0, 1, 2]), y[0, 1, 2], rtol=1e-4, atol=1e-5)  # each token on its own
    (grad,) = torch.autograd.grad(y[1, 2, 3, 5], x, retain_graph=True)
    assert bool((grad[1, 2, 3] != 0).all()), "every channel sees all"
    assert int((grad != 0).sum()) == 12
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    base = build(width=3).state_dict()
    for option, value in (("width", 6), ("d_state", 4), ("d_conv", 3), ("expand", 1)):
        other = build(**{"width": 3, option: value}).state_dict()
        assert any(other[k].shape != v.shape for k, v in base.items()), option
    with pytest.raises(ConfigError, match=r"channel_mixer.width: 5 does not divide the 12 channels"):
        build(width=5)


@pytest.mark.parametrize("config", [PYRAMID, ISOTROPIC], ids=["pyramid", "isotropic"])
@pytest.mark.parametrize("channel_mixer", ["mlp", None])
def test_averages_start_as_the_plain_model(config: dict[str, Any], channel_mixer: Any) -> None:
    config = {**config, "channel_mixer": channel_mixer}
    torch.manual_seed(0)
    plain = create_model(config).eval()
    averaged = create_model(config, average_layers=True).eval()
    added = {k for k in averaged.state_dict() if ".average." in k}
    missing, unexpected = averaged.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == added
    assert added
    assert not unexpected
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(averaged(x), plain(x))
    assert added <= averaged.no_weight_decay()
    for module in averaged.modules():
        if type(module).__name__ == "DepthAverage":
            for weight in module.weights:
                nn.init.normal_(weight)
    changed = averaged(x)
    assert not torch.allclose(changed, plain(x), rtol=1e-4, atol=1e-5)
    changed.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in averaged.named_parameters()}
    assert all(grads[n].abs().min() > 0 for n in added)
    averaged.zero_grad()
    averaged.set_grad_checkpointing()
    averaged(x).square().sum().backward()
    for n, p in averaged.named_parameters():
        torch.testing.assert_close(p.grad, grads[n])
    torch.testing.assert_close(averaged.forward_intermediates(x)[0], averaged.forward_features(x))


def test_averages_by_their_definition() -> None:
    """Across the stages of an isotropic model, half by half."""
    torch.manual_seed(0)
    model = create_model(ISOTROPIC, average_layers=True, drop_path=0.0).eval()
    weights = [w for stage in model.stages for w in stage.average.weights]
    assert [len(w) for w in weights] == [2, 3, 4, 5, 6, 7]
    for weight in weights:
        nn.init.normal_(weight)
    image = torch.randn(1, 3, 16, 16)
    x = model.embed(image)
    outputs, inputs = [x], x
    halves = [half for stage in model.stages for half in stage.blocks[0].halves()]
    for weight, half in zip(weights, halves, strict=True):
        outputs.append(half(inputs))
        inputs = torch.einsum("l,lbhwc->bhwc", weight, torch.stack(outputs))
    torch.testing.assert_close(model.tokens(image), inputs)


def test_averages_of_a_pyramid_stay_in_their_stage() -> None:
    model = create_model(PYRAMID, average_layers=True, block=["metaformer", "serial"])
    # two blocks of two halves, three blocks that are not divided
    assert [[len(w) for w in s.average.weights] for s in model.stages] == [[2, 3, 4, 5], [2, 3, 4]]


def test_pruned_tokens_cannot_be_averaged() -> None:
    with pytest.raises(ConfigError, match=r"^model\.average_layers: blocks that drop tokens"):
        create_model("sparsifiner_deit_small", block="token_pruning", average_layers=True)


@pytest.mark.parametrize(("name", "depth"), [("vim2_tiny", 9), ("vim2_small", 27)])
def test_vim2(name: str, depth: int) -> None:
    model = on_meta(name)
    assert [len(s.blocks) for s in model.stages] == [2, 2, depth, 2]
    torch.manual_seed(0)
    small = create_model(name, dims=[16, 16, 32, 32], depths=[1, 1, 2, 1], num_classes=3, image_size=64)
    logits = small(torch.randn(2, 3, 64, 96))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_reach_of_the_atrous_pyramid_grows() -> None:
    """Of a token in the middle of the map, stage by stage, from the gradient of its scan: in pixels."""
    model = create_model("atrousmamba_tiny", dims=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_classes=3).eval()
    reach = []
    for stage, (mixer, grid) in zip(model.stages, model.mixers_with_grids(224), strict=True):
        x = torch.randn(1, *grid, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(stage.blocks[0].mixer(x)[0, grid[0] // 2, grid[1] // 2].sum(), x)
        rows = (grad[0].abs().sum((1, 2)) > 0).nonzero().flatten()
        step = int((rows[1:] - rows[:-1]).min())
        reach.append((len(rows) * step * 224 // grid[0], step))
        assert mixer is stage.blocks[0].mixer
    assert reach == [(28, 1), (112, 2), (224, 2), (224, 1)]
    assert model(torch.randn(1, 3, 96, 64)).isfinite().all()  # windows that do not divide the maps


def test_channel_mixer_in_a_language_model() -> None:
    """It looks at each token alone, so that a causal model stays causal."""
    torch.manual_seed(0)
    model = create_model(
        "mamba_tiny", dim=32, depth=2, vocab_size=17, channel_mixer={"name": "selective_channel"}
    ).eval()
    ids = torch.randint(17, (1, 9))
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 17
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a[:, 6:], b[:, 6:], atol=1e-3)
    exempt = model.no_weight_decay()
    inner = [n for n, _ in model.named_parameters() if ".channel_mixer." in n]
    assert any(n.endswith("A_log") and n in exempt for n in inner)
    assert any(n.endswith("enter.weight") and n not in exempt for n in inner)

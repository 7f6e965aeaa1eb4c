"""Clips in, maps out: models with frames, and the head for dense prediction."""

from __future__ import annotations

import pytest
import torch
from mixerzoo import ConfigError, create_model, resize_grid
from mixerzoo.models.parts.channel_mixers import CHANNEL_MIXERS

PYRAMID = {
    "backbone": "pyramid",
    "dims": [8, 16],
    "depths": [1, 1],
    "mixer": "pooling",
    "stem": {"name": "conv", "kernel_size": 3, "stride": 2, "padding": 1},
    "downsample": {"name": "conv", "kernel_size": 3, "stride": 2, "padding": 1},
    "head": {"name": "upsample", "width": 8},
    "num_classes": 3,
    "in_chans": 2,
    "image_size": 16,
    "init_std": None,
}
ISOTROPIC = {
    "backbone": "isotropic",
    "dim": 16,
    "depth": 2,
    "mixer": {"name": "attention", "head_dim": 8},
    "patch_size": 4,
    "position": "learned",
    "num_classes": 3,
    "in_chans": 2,
    "image_size": 16,
    "init_std": None,
}


def built(config, **changes):
    torch.manual_seed(0)
    return create_model({**config, **changes}).eval()


def finite(model, y):
    y.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 30)])
@pytest.mark.parametrize("frames", [None, 2, 3])
def test_a_value_for_every_pixel(size, frames):
    model = built(PYRAMID, frames=frames)
    shape = (2, 2, *size) if frames is None else (2, 2, frames, *size)
    y = model(torch.randn(shape))
    assert y.shape == (2, 3, *size)
    finite(model, y)


def test_isotropic_models_take_the_head_too():
    model = built(ISOTROPIC, frames=3, head={"name": "upsample", "width": 8})
    y = model(torch.randn(2, 2, 3, 16, 16))
    assert y.shape == (2, 3, 16, 16)
    finite(model, y)
    image = built(ISOTROPIC, head="upsample")
    assert image(torch.randn(2, 2, 16, 16)).shape == (2, 3, 16, 16)


def test_the_encoder_is_shared_and_frames_meet_in_the_head():
    model, x = built(PYRAMID, frames=2), torch.randn(3, 2, 2, 16, 16)
    both = model.forward_features(x)
    assert both.shape == (3, 16, 2, 4, 4)
    alone = built(PYRAMID, head="linear")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    alone.load_state_dict(weights, strict=False)
    for t in range(2):
        torch.testing.assert_close(both[:, :, t], alone.forward_features(x[:, :, t]))
    assert not torch.allclose(model(x), model(x.flip(2)))


def test_differences_see_no_difference_between_equal_frames():
    model = built(PYRAMID, frames=2, head={"name": "upsample", "width": 8, "join": "difference"})
    frame = torch.randn(2, 2, 1, 16, 16)
    same = model(torch.cat([frame, frame], 2))
    torch.testing.assert_close(same, model(torch.zeros(2, 2, 2, 16, 16)))
    x = torch.cat([frame, frame + torch.randn_like(frame)], 2)
    assert not torch.allclose(model(x), same)
    torch.testing.assert_close(model(x), model(x.flip(2)))
    joined = built(PYRAMID, frames=2)
    assert joined.head.lateral[0].in_features == 2 * model.head.lateral[0].in_features


def test_every_stage_reaches_the_map():
    model, x = built(PYRAMID, frames=2), torch.randn(1, 2, 2, 16, 16)
    before = model(x)
    for lateral in model.head.lateral:
        kept = lateral.weight.detach().clone()
        with torch.no_grad():
            lateral.weight.zero_()
            assert not torch.allclose(model(x), before)
            lateral.weight.copy_(kept)


def test_the_map_is_as_fine_as_pixels():
    """One token of four pixels can give four different values."""
    model = built(ISOTROPIC, patch_size=2, head={"name": "upsample", "width": 8})
    x = torch.randn(64, 2, 16, 16)
    target = x[:, :1] - x[:, 1:]
    model.train().reset_classifier(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # a value per token of 2x2 pixels could explain a quarter of the variance at most
    assert loss.item() < 0.6 * target.var().item()


def test_clips_are_grids_of_three_axes():
    model, x = built(ISOTROPIC, frames=3), torch.randn(2, 2, 3, 16, 16)
    assert model.grid == (3, 4, 4)
    assert model(x).shape == (2, 3)
    features, maps = model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
    assert features.shape == (2, 16, 3, 4, 4)
    assert torch.equal(maps[-1], features)
    assert model.forward_intermediates(x, 1, intermediates_only=True, output_fmt="NHWC")[0].shape == (2, 3, 4, 4, 16)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)
    assert [grid for _, grid in model.mixers_with_grids(24)] == [(3, 6, 6)] * 2
    # attention without positions inside: frames are told apart by the position table alone
    assert not torch.allclose(model(x), model(x.flip(2)))
    finite(model, model(x))


def test_position_tables_of_clips_are_resized_frame_by_frame():
    clip, image = built(ISOTROPIC, frames=3), built(ISOTROPIC)
    tables = clip.position.detach().view(3, 16, 16)
    larger = torch.randn(1, 2, 3, 24, 16)
    seen = clip(larger)
    resize_grid(clip, (24, 16))
    assert clip.grid == (3, 6, 4)
    assert clip.position.shape == (1, 72, 16)
    torch.testing.assert_close(clip(larger), seen)
    for t in range(3):
        with torch.no_grad():
            image.position.copy_(tables[t])
        torch.testing.assert_close(clip.position.view(3, 24, 16)[t], image.resized_position((6, 4))[0])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (PYRAMID, {"head": {"name": "upsample", "join": "difference"}}, "head.join"),
        (PYRAMID, {"head": {"name": "upsample", "width": 0}}, "head.width"),
        (PYRAMID, {"head": {"name": "upsample", "joint": "concat"}}, "join"),
        (ISOTROPIC, {"frames": 0}, "frames"),
        (ISOTROPIC, {"frames": 2, "class_token": True}, "frames"),
        (PYRAMID, {"frames": 0}, "frames"),
    ],
)
def test_mistakes(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        built(config, **changes)


def test_other_shapes_are_refused():
    with pytest.raises(ConfigError, match=r"clips must have the shape \(batch, 2, 2, height, width\)"):
        built(PYRAMID, frames=2)(torch.randn(1, 2, 3, 16, 16))
    with pytest.raises(ConfigError, match="images must have the shape"):
        built(PYRAMID)(torch.randn(1, 2, 2, 16, 16))
    model = built(PYRAMID)
    with pytest.raises(ConfigError, match="maps of all stages"):
        model.forward_head(model.forward_features(torch.randn(1, 2, 16, 16)))
    with pytest.raises(ConfigError, match=r"head\.pool"):
        model.reset_classifier(3, "avg")


def test_channel_attention_conv_by_hand():
    torch.manual_seed(0)
    mixer = CHANNEL_MIXERS.build(
        {"name": "channel_attention_conv", "compress": 2, "squeeze": 4}, 8, key="channel_mixer"
    )
    x = torch.randn(2, 3, 4, 5, 8, requires_grad=True)
    y = mixer(x)
    for b in range(2):
        for t in range(3):
            image = x[b, t].movedim(-1, 0)[None]
            u = mixer.conv2(torch.nn.functional.gelu(mixer.conv1(image)))[0]
            weight = torch.sigmoid(mixer.fc2(torch.relu(mixer.fc1(u.mean((1, 2))))))
            torch.testing.assert_close(y[b, t].movedim(-1, 0), u * weight[:, None, None])
    torch.testing.assert_close(mixer(x[:, 1]), y[:, 1])
    with pytest.raises(ConfigError, match="grid axes"):
        mixer(x[0, 0])
    with pytest.raises(ConfigError, match="squeeze"):
        CHANNEL_MIXERS.build({"name": "channel_attention_conv"}, 8, key="channel_mixer")

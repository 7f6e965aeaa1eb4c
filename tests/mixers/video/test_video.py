"""Mixers of video, against VFIMamba's numbers and against definitions written out."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer, mixer_class
from mixerzoo.mixers.orders.orders import Order
from mixerzoo.tests.utils import check_golden, load_golden

GRID = (5, 3, 4)  # T, H, W


def clip(batch=2, dim=16, grid=GRID):
    return torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(1))


def to_clips(x):
    """The official batch holds all first frames, then all second ones."""
    return torch.stack(x.chunk(2), 1)


def to_batch(y):
    return torch.cat(y.unbind(1))


def test_mixed_ssm_equals_vfimamba():
    golden = load_golden("vfimamba_ss2d")
    kwargs = golden.kwargs
    mixer = create_mixer(
        "mixed_ssm", kwargs["d_model"], d_state=kwargs["d_state"], d_conv=kwargs["d_conv"],
        ssm_ratio=kwargs["expand"], dt_rank=None if kwargs["dt_rank"] == "auto" else kwargs["dt_rank"],
        official_unmerge=True,
    )  # fmt: skip
    check_golden(
        golden, mixer, mixer_class("mixed_ssm").convert_official,
        to_ours=to_clips, to_theirs=to_batch,
    )  # fmt: skip


def test_scan_and_places_are_the_official_ones():
    golden = load_golden("vfimamba_ss2d")
    dim = golden.kwargs["d_model"]
    mixer = create_mixer("mixed_ssm", dim, official_unmerge=True)
    grid = (2, *golden["input"].shape[1:3])
    index = mixer.order.table(grid).index.view(-1, 4).T  # paths side by side
    assert torch.equal(index, golden["output.scan_token_ids"])
    place = mixer.places.table(grid).inverse
    assert torch.equal(place % 4, torch.arange(4)[:, None].expand_as(place))  # each on its own path
    inverse = place // 4
    theirs = golden["output.unmerge_positions"].flatten(1)[[0, 2, 1, 3]]  # rows and columns alternate there
    assert torch.equal(inverse, theirs)
    right = create_mixer("mixed_ssm", dim)
    assert right.order.key == right.places.key
    assert not torch.equal(right.places.table(grid).inverse[1], mixer.places.table(grid).inverse[1])


def windows(grid, size, shift):
    """The box of every token, by its definition."""
    offset = [s // 2 if shift and n > s else 0 for n, s in zip(grid, size, strict=True)]
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    boxes = [(axis + o) // s for axis, o, s in zip((t, h, w), offset, size, strict=True)]
    return torch.stack(boxes, -1).flatten(0, 2)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("grid", [GRID, (4, 4, 4), (3, 1, 7)])
def test_windowed_attention_is_attention_with_the_mask_of_boxes(layer, grid):
    order = {"name": "window", "size": [2, 2, 3]}
    torch.manual_seed(0)
    mixer = create_mixer("attention", 16, head_dim=8, order=order, causal_paths=False, layer_index=layer)
    x = clip(grid=grid)
    (plain,) = (m for m in mixer.modules() if type(m).__name__ == "Attention")
    q, k, v = plain.project(x.flatten(1, 3), None)
    box = windows(grid, (2, 2, 3), layer == 1)
    same = (box[:, None] == box).all(-1)
    y = torch.nn.functional.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=same)
    expected = plain.proj(y.transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-6)


def test_rotary_major_reads_another_axis_first_in_every_layer():
    neighbours = []
    for layer in range(4):
        index = Order("rotary_major", layer_index=layer).table(GRID).index
        t, rest = index // 12, index % 12
        place = torch.stack([t, rest // 4, rest % 4], 1)
        step = (place[1] - place[0]).tolist()
        slowest = max(range(3), key=lambda axis: (place[:, axis].diff() == 0).sum().item())
        neighbours.append((step.index(1), slowest))
        assert torch.equal(index.sort().values, torch.arange(60))
    # (fastest, slowest) axis of T, H, W
    assert neighbours == [(2, 0), (1, 0), (0, 1), (0, 2)]


def mate_by_hand(mixer, x, layer):
    axes = [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)][layer % 4]
    batch, *grid, dim = x.shape
    pooled = torch.nn.functional.adaptive_avg_pool3d(x.movedim(-1, 1), [-(-s // 4) for s in grid]).movedim(1, -1)

    def turned(z):
        return z.permute(0, *(a + 1 for a in axes), 4).flatten(1, 3)

    total = torch.zeros_like(x)
    for direction, scan in enumerate(mixer.scans):
        review, tokens = turned(pooled), turned(x)
        if direction:
            review, tokens = review.flip(1), tokens.flip(1)
        y = scan(torch.cat([review, tokens], 1))[:, review.shape[1] :]
        y = y.flip(1) if direction else y
        y = y.view(batch, *(grid[a] for a in axes), dim)
        total += y.permute(0, *(axes.index(a) + 1 for a in range(3)), 4)
    return total + mixer.attention(x)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 5])
def test_mate(layer):
    torch.manual_seed(0)
    mixer, x = create_mixer("mate", 16, d_state=8, head_dim=8, layer_index=layer), clip()
    torch.testing.assert_close(mixer(x), mate_by_hand(mixer, x, layer), rtol=1e-5, atol=1e-6)


def test_the_review_shows_the_end_to_the_beginning():
    x = clip().requires_grad_()
    for review, sees in ((4, True), (0, False)):
        torch.manual_seed(0)
        mixer = create_mixer("mate", 16, d_state=8, head_dim=8, review=review)
        forwards = mixer.scans[0](mixer.order.scan(x)[:, 0])
        assert forwards.shape == (2, 60, 16)
        with torch.no_grad():
            for parameter in (*mixer.scans[1].out_proj.parameters(), *mixer.attention.parameters()):
                parameter.zero_()
        (grad,) = torch.autograd.grad(mixer(x)[:, 0, 0, 0].sum(), x)
        assert (grad[:, -1, -1, -1].abs().max() > 1e-8) == sees


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mate", {"review": -1}, "mixer.review"),
        ("mate", {"window": (0, 2, 2)}, "mixer.window"),
        ("mate", {"window": (2, 2)}, "window"),
        ("mixed_ssm", {"d_conv": 2}, "d_conv"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_mixer(name, 16, **options)
    with pytest.raises(ConfigError, match="grid axes"):
        create_mixer(name, 16)(torch.randn(1, 4, 4, 16))


def test_orders_refuse():
    with pytest.raises(ConfigError, match="as_frames"):
        Order({"name": "frame_interleaved", "as_frames": True})
    with pytest.raises(ConfigError, match=r"order\.size"):
        Order({"name": "window", "size": [2, 2]})

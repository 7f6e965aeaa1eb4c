"""MLP-Mixer, ResMLP, gMLP, NiNformer and dense mixing: official values, causality, streams, grids."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.mlp.gated_mlp import GMlp, NiNformer
from mixerzoo.tests.mixers.sequence_checks import check_size_of_state, perturb
from mixerzoo.tests.utils import check_golden, load_golden
from torch import Tensor, nn

MATRIX = ["dense", "resmlp", "gmlp", "mlp_mixer"]
CAUSAL = [(name, {}) for name in MATRIX] + [
    ("dense", {"softmax": True, "num_heads": 2}),
    ("mlp_mixer", {"token_hidden": 45}),  # several hidden units for each position
]
IDS = [n + "".join(f"-{k}" for k in o) for n, o in CAUSAL]


class GatingUnit(nn.Module):
    """The gate alone, from the parts of the mixer."""

    def __init__(self, mixer: GMlp) -> None:
        super().__init__()
        self.norm, self.proj = mixer.norm, mixer.proj
        self.mix = mixer.mix

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return u * self.mix(self.norm(v))


def test_spatial_gating_unit_equals_timm() -> None:
    golden = load_golden("gmlp_sgu")
    mixer = create_mixer("gmlp", 8, grid=(golden.kwargs["seq_len"],), ratio=golden.kwargs["dim"] / 8)
    assert isinstance(mixer, GMlp)
    unit = GatingUnit(mixer)
    check_golden(golden, unit, lambda p: p)


def test_mixer_gating_unit_equals_official() -> None:
    golden = load_golden("ninformer_mgu")
    kwargs = golden.kwargs
    mixer = create_mixer(
        "ninformer",
        kwargs["dim"],
        grid=(kwargs["seq_len"],),
        token_hidden=kwargs["token_dim"],
        channel_hidden=kwargs["channel_dim"],
    )
    check_golden(golden, mixer, NiNformer.convert_official)


def small(name: str, length: int = 17, **options) -> nn.Module:
    torch.manual_seed(0)
    return perturb(create_mixer(name, 8, grid=(length,), causal=True, **options), std=0.3)


@pytest.mark.parametrize(("name", "options"), CAUSAL, ids=IDS)
def test_causal_form(name: str, options: dict) -> None:
    if options:
        check_options(name, options)
    check_size_of_state(small(name, length=40, **options), 8)


@pytest.mark.parametrize(("name", "options"), CAUSAL, ids=IDS)
def test_causal_form_takes_shorter_sequences(name: str, options: dict) -> None:
    """The first tokens give the same, with or without the rest, and before and after growing."""
    mixer = small(name, **options)
    x = torch.randn(2, 17, 8)
    expected = mixer(x)
    torch.testing.assert_close(mixer(x[:, :6]), expected[:, :6], rtol=1e-5, atol=1e-5)
    for length in (25, 9):
        mixer.resize_grid((length,))
        n = min(length, 17)
        torch.testing.assert_close(mixer(x[:, :n]), expected[:, :n], rtol=1e-5, atol=1e-5)


def test_hidden_units_of_a_position_see_no_later_token() -> None:
    mixer = small("mlp_mixer", token_hidden=45)
    assert mixer.w1.shape == (51, 17)
    (jacobian,) = torch.autograd.functional.jacobian(lambda x: mixer(x)[0, :, 0], (torch.randn(1, 17, 8),))
    assert torch.equal(jacobian[:, 0, :, 0].triu(1), torch.zeros(17, 17))
    assert (jacobian[:, 0, :, 0].tril() != 0)[1:, 0].all()


def test_too_long() -> None:
    mixer = small("dense", length=4)
    with pytest.raises(ConfigError, match="resize_grid"):
        mixer(torch.randn(1, 5, 8))
    _, state = mixer.prefill(torch.randn(2, 4, 8))
    with pytest.raises(ConfigError, match="at most 4"):
        mixer.step(torch.randn(2, 8), state)
    with pytest.raises(ConfigError, match="sequences"):
        create_mixer("dense", 8, grid=(4, 4), causal=True)
    with pytest.raises(ConfigError, match="causal=True"):
        create_mixer("dense", 8, grid=(4,)).init_state(1)


def test_shift_by_its_definition() -> None:
    x = torch.randn(2, 4, 5, 12)
    y = create_mixer("shift", 12, fraction=0.67, distance=2)(x)
    assert torch.equal(y[..., 8:], x[..., 8:])
    for channels, axis, step in ((slice(0, 2), 1, 2), (slice(2, 4), 1, -2), (slice(4, 6), 2, 2), (slice(6, 8), 2, -2)):
        moved = x[..., channels].roll(step, axis)
        index = slice(0, 2) if step > 0 else slice(-2, None)
        moved[(slice(None), index) if axis == 1 else (slice(None), slice(None), index)] = 0
        assert torch.equal(y[..., channels], moved)


def test_causal_shift() -> None:
    options = {"distance": 3, "fraction": 0.5}
    check_options("shift", options)
    check_size_of_state(create_mixer("shift", 8, causal=True, **options), 8)
    with pytest.raises(ConfigError, match="wrap"):
        create_mixer("shift", 8, causal=True, padding="wrap")


@pytest.mark.parametrize("dim", [16, 20])  # 16 channels: torch.chunk gives only 4 of the 5 groups
def test_mix_shift_by_its_definition(dim: int) -> None:
    mixer = create_mixer("mix_shift", dim, mix_size=(1, 1, 3, 5, 7))
    x = torch.randn(1, 6, 7, dim)
    groups = torch.tensor_split(x.permute(0, 3, 1, 2), 5, 1)
    total = torch.zeros(1, dim, 6, 7)
    for convs, axis in ((mixer.horizontal, 3), (mixer.vertical, 2)):
        rolled = [g.roll(d, axis) for g, d in zip(groups, (-2, -1, 0, 1, 2), strict=True)]
        total += torch.cat([conv(g) for conv, g in zip(convs, rolled, strict=True)], 1)
    torch.testing.assert_close(mixer(x), total.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_dense_by_its_definition() -> None:
    mixer = perturb(create_mixer("dense", 6, grid=(2, 3), num_heads=2))
    x = torch.randn(2, 2, 3, 6)
    y = mixer(x).flatten(1, 2)
    for head in range(2):
        channels = slice(3 * head, 3 * head + 3)
        expected = mixer.weight[head] @ x.flatten(1, 2)[..., channels] + mixer.bias[:, None]
        torch.testing.assert_close(y[..., channels], expected)


def test_dense_softmax_averages_over_real_tokens() -> None:
    mixer = perturb(create_mixer("dense", 4, grid=(6,), softmax=True), std=1.0)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    x = torch.randn(1, 6, 4)
    weights = mixer.weight[0].masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(mixer(x, mask=mask)[0], weights @ x[0], rtol=1e-5, atol=1e-5)


def test_raft_and_strip_on_grids_that_are_not_square() -> None:
    """Columns mix along the height, rows along the width: a change in one place reaches its row and column alone."""
    torch.manual_seed(0)
    mixer = perturb(create_mixer("raft", 8, grid=(3, 5), raft_size=2)).eval()
    x = torch.randn(1, 3, 5, 8)
    changed = x.clone()
    changed[0, 1, 2, 0] += 1  # of one channel: norms forget what is added to all
    column = mixer.vertical(changed, None) - mixer.vertical(x, None)
    assert (column.abs().sum(-1)[0] > 1e-6).sum(0).tolist() == [0, 0, 3, 0, 0]
    strip = perturb(create_mixer("strip", 16, grid=(4, 6))).eval()
    y = torch.randn(1, 4, 6, 8)
    other = y.clone()
    other[0, 0, 2] += 1
    rows = (strip.rows(other) - strip.rows(y)).abs().sum(-1)[0] > 1e-6
    assert rows.sum(1).tolist() == [6, 6, 0, 0]  # its row and the one next to it
    assert strip(torch.randn(2, 4, 6, 16)).shape == (2, 4, 6, 16)


def test_resizing_raft() -> None:
    """Weights that are constant along the positions: a constant map gives the same on any grid."""
    torch.manual_seed(0)
    mixer = create_mixer("raft", 16, grid=(4, 6)).eval()
    with torch.no_grad():
        for axis in (mixer.vertical, mixer.horizontal):
            for weight, positions in ((axis.fc1.weight, 1), (axis.fc2.weight, 0)):
                size = weight.shape[positions] // 2
                rafts = weight.unflatten(positions, (2, size)).mean(positions + 1)
                weight.copy_(10 * rafts.repeat_interleave(size, positions))
            axis.fc2.bias.fill_(0.3)
    channels = torch.randn(16)
    before = mixer(channels.expand(1, 4, 6, 16))
    mixer.resize_grid((7, 5))
    after = mixer(channels.expand(1, 7, 5, 16))
    assert before.std() > 0.05
    torch.testing.assert_close(after[0, 3, 2], before[0, 1, 3], rtol=1e-4, atol=1e-5)


def test_resizing_strip() -> None:
    """Strip layers sum over the mixed axis as before; relative positions keep their centre and their sides."""
    torch.manual_seed(0)
    mixer = create_mixer("strip", 16, grid=(4, 6)).eval()
    with torch.no_grad():
        weight = mixer.rows.conv.weight
        weight.copy_(weight.mean((0, 1), keepdim=True).expand_as(weight))
        mixer.rows.conv.bias.fill_(0.3)
        mixer.position_rows.copy_(torch.linspace(-1, 1, 13)[:, None].expand(13, 8))
    channels = torch.randn(8)
    before = mixer.rows(channels.expand(1, 4, 6, 8))[0, 1, 3]
    mixer.resize_grid((8, 5))
    after = mixer.rows(channels.expand(1, 8, 5, 8))[0, 4, 2]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert mixer.position_rows.shape == (17, 8)
    middle = mixer.position_rows[:, 0].detach()
    assert abs(float(middle[8])) < 1e-6
    assert (middle.diff() > 0).all()
    assert mixer(torch.randn(1, 8, 5, 16)).shape == (1, 8, 5, 16)


def test_raft_with_a_native_grid_refuses_a_mask_when_it_resizes() -> None:
    mixer = create_mixer("raft", 8, grid=(6, 4), native_grid=(4, 4))
    mask = torch.ones(1, 6, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match="mask"):
        mixer(torch.randn(1, 6, 4, 8), mask=mask)
    assert mixer(torch.randn(1, 4, 4, 8), mask=mask[:, :4]).shape == (1, 4, 4, 8)


@pytest.mark.parametrize("name", [*MATRIX, "ninformer"])
def test_resizing_keeps_the_answer_for_smooth_maps(name: str) -> None:
    """The same smooth map, sampled more finely, is mixed to about the same smooth map."""
    torch.manual_seed(0)
    mixer = create_mixer(name, 8, grid=(8, 8))
    with torch.no_grad():  # smooth weights, as trained ones are
        for key, parameter in mixer.named_parameters():
            if parameter.shape[-1] == 64 and parameter.ndim > 1:
                coarse = torch.randn(*parameter.shape[:-1], 2, 2).flatten(0, -3)[None]
                fine = nn.functional.interpolate(coarse, (8, 8), mode="bicubic").view(parameter.shape)
                parameter.copy_(fine / 64 if parameter.shape[-2] != 64 else 0.2 + fine.mean(-2, keepdim=True) / 64)
            elif key.endswith("bias") and parameter.shape == (64,):
                parameter.fill_(0.3)
            elif key.endswith("fc2.weight") and parameter.shape[0] == 64:
                parameter.copy_(torch.randn(1, parameter.shape[1]).expand_as(parameter))

    def wave(side: int) -> Tensor:
        at = (torch.arange(side) + 0.5) / side
        return torch.cos(torch.pi * at)[:, None, None] * torch.cos(torch.pi * at)[None, :, None] + torch.arange(8.0) / 8

    before = mixer(wave(8)[None])
    mixer.resize_grid((16, 16))
    after = mixer(wave(16)[None])
    pooled = after.view(1, 8, 2, 8, 2, 8).mean((2, 4))
    assert (pooled - before).abs().max() < 0.05 * before.abs().max()

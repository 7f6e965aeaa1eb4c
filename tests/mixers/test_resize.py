"""Interpolation of parameters to another grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.mixers.resize import resize_spectral_weight, resize_tokens_weight


def test_tokens_are_interpolated_bicubically():
    weight = torch.randn(5, 4 * 6)
    ours = resize_tokens_weight(weight, (4, 6), (7, 3), [1])
    theirs = F.interpolate(weight.view(1, 5, 4, 6), size=(7, 3), mode="bicubic", align_corners=False)
    torch.testing.assert_close(ours.view(5, 7, 3), theirs[0], atol=1e-5, rtol=1e-5)


def test_both_axes_of_a_mixing_matrix_and_the_sum():
    weight = torch.randn(12, 12)
    assert torch.equal(resize_tokens_weight(weight, (3, 4), (3, 4), [0, 1], summed=[1]), weight)
    rows = torch.linspace(-1, 1, 12)[:, None].expand(12, 12)  # an averaging matrix with a gain per output token
    bigger = resize_tokens_weight(rows, (3, 4), (6, 8), [0, 1], summed=[1])
    assert bigger.shape == (48, 48)
    gain = resize_tokens_weight(rows.sum(1), (3, 4), (6, 8), [0])
    torch.testing.assert_close(bigger.sum(1), gain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    old, new = (4, 3, 2)[:rank], (5, 6, 4)[:rank]
    weight = resize_tokens_weight(torch.ones(torch.tensor(old).prod(), 2), old, new, [0])
    torch.testing.assert_close(weight, torch.ones(torch.tensor(new).prod(), 2))


@pytest.mark.parametrize("old", [(6, 5), (5, 8), (4, 4)])
@pytest.mark.parametrize("new", [(9, 7), (8, 12), (12, 6)])
def test_spectral_keeps_the_kernel(old, new):
    """On a larger grid the filter convolves with the same taps: impulses give the same response."""
    taps = torch.zeros(*old, 3)
    taps[0, 0], taps[1, 0], taps[0, -1], taps[-1, 1] = 1.0, 2.0, -3.0, 0.5
    weight = torch.fft.rfftn(taps, dim=(0, 1))
    moved = torch.zeros(*new, 3)
    moved[0, 0], moved[1, 0], moved[0, -1], moved[-1, 1] = 1.0, 2.0, -3.0, 0.5
    ours = resize_spectral_weight(weight, old, new, [0, 1])
    torch.testing.assert_close(ours, torch.fft.rfftn(moved, dim=(0, 1)), atol=1e-5, rtol=1e-5)


def test_spectral_interpolates_samples_and_returns():
    weight = torch.fft.rfftn(torch.randn(6, 8, 2), dim=(0, 1))
    up = resize_spectral_weight(weight, (6, 8), (12, 16), [0, 1])
    torch.testing.assert_close(up[::2, ::2], weight, atol=1e-5, rtol=1e-5)  # the old samples are among the new ones
    torch.testing.assert_close(resize_spectral_weight(up, (12, 16), (6, 8), [0, 1]), weight, atol=1e-5, rtol=1e-5)


def test_mistakes_name_the_sizes():
    with pytest.raises(ConfigError, match="needs 12"):
        resize_tokens_weight(torch.ones(5, 11), (3, 4), (6, 8), [1])
    with pytest.raises(ConfigError, match="ranks"):
        resize_tokens_weight(torch.ones(5, 12), (3, 4), (6,), [1])
    with pytest.raises(ConfigError, match="complex"):
        resize_spectral_weight(torch.ones(4, 3), (4, 4), (6, 6), [0, 1])
    with pytest.raises(ConfigError, match="needs 3"):
        resize_spectral_weight(torch.ones(4, 4, dtype=torch.complex64), (4, 4), (6, 6), [0, 1])

"""PoNet against the official numbers."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.local.ponet import PoNet
from mixerzoo.tests.utils import load_golden, relative_error
from torch import nn


def build(kwargs):
    width = kwargs["num_head"] * kwargs["head_dim"]
    return PoNet(width, num_heads=kwargs["num_head"], head_dim=kwargs["head_dim"], segment_num=kwargs["segment_num"])


def test_golden_module():
    golden = load_golden("ponet_attention_module")
    mixer = build(golden.kwargs)
    mixer.load_state_dict(mixer.convert_official(golden.params))
    x = golden["input.X"].clone().requires_grad_()
    y = mixer(x, mask=golden["input.mask"] > 0.5)
    assert relative_error(y, golden["output"]) < 1e-5
    (y * golden["cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.input.X"]) < 2e-5
    expected = mixer.convert_official(golden.group("grad.param"))
    for name, parameter in mixer.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 2e-5, name


def test_golden_pooling():
    """The projections of the mixer replaced by what the official pooling is given."""
    golden = load_golden("ponet_pooling")
    mixer = build(golden.kwargs)
    parts = [golden[f"input.{n}"].clone().requires_grad_() for n in ("Q", "K", "O", "local", "segment")]
    flat = [p.transpose(1, 2).flatten(2) if p.ndim == 4 else p for p in parts]

    class Given(nn.Module):
        def forward(self, x):
            return torch.cat(flat, -1)

    mixer.in_proj, mixer.out_proj = Given(), nn.Identity()
    y = mixer(flat[3], mask=golden["input.attention_mask"] > 0.5)
    assert relative_error(y, golden["output"]) < 1e-5
    (y * golden["cotangent"]).sum().backward()
    for name, part in zip(("Q", "K", "O", "local", "segment"), parts, strict=True):
        assert relative_error(part.grad, golden[f"grad.input.{name}"]) < 2e-5, name


def test_fixed_segments_do_not_depend_on_padding():
    mixer = PoNet(16, head_dim=8, segment_length=4)
    x = torch.randn(2, 10, 16)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 7:] = False
    y = mixer(x, mask=mask)
    torch.testing.assert_close(y[1:, :7], mixer(x[1:, :7]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"segment_num": 0}, {"window": 2}, {"segment_length": 0}, {"head_dim": 0}])
def test_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_mixer("ponet", 16, **options)

"""Packed documents in mixers whose registry-wide test does not reach them."""

from __future__ import annotations

import pytest
import torch
from mixerzoo import ConfigError, create_mixer


@pytest.mark.parametrize("options", [{}, {"segment_length": 3}])
def test_ponet_packed_documents_do_not_leak(options: dict) -> None:
    torch.manual_seed(0)
    mixer = create_mixer("ponet", 32, **options)
    x = torch.randn(2, 12, 32, requires_grad=True)
    ids = torch.tensor([[3] * 5 + [1] * 7, [0] * 9 + [2] * 3])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 10:] = False
    y = mixer(x, document_ids=ids, mask=mask)
    (grad,) = torch.autograd.grad(y[0, 5:10].square().sum() + y[1, 9:].square().sum(), x)
    for foreign in (grad[0, :5], grad[0, 10:], grad[1, :9]):
        assert foreign.abs().max() == 0
    assert grad[0, 5:10].abs().min() > 0
    if options:  # segments that do not depend on the length: as the document alone
        torch.testing.assert_close(y[0, 5:10], mixer(x[:1, 5:10])[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_shift_packed_documents_are_apart(causal: bool) -> None:
    mixer = create_mixer("shift", 32, causal=causal, distance=2)
    x = torch.randn(2, 12, 32)
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    y = mixer(x, document_ids=ids)
    assert torch.equal(y, torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1))
    with pytest.raises(ConfigError, match="document_ids"):
        create_mixer("shift", 32, padding="wrap")(x, document_ids=ids)
    with pytest.raises(ConfigError, match="causal form only"):
        create_mixer("dense", 32, grid=(12,))(x, document_ids=ids)

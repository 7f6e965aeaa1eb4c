"""Packed documents in mixers whose registry-wide test does not reach them."""

from __future__ import annotations

import pytest
import torch
from mixerzoo import ConfigError, create_mixer
from mixerzoo.tests.mixers import sequence_checks as checks

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "position": "rotary"}
SPARSE = {
    "top_k": ("block_sparse_attention", {"selector": {"name": "top_k", "keep": 1}, "block_size": 2}),
    "window": ("block_sparse_attention", {"selector": "window", "block_size": 3}),
    "attention": ("permuted_attention", {"selector": "top_p", "block_size": 2, "segment_size": 4}),
    "norm": ("permuted_attention", {"selector": "top_k", "permutation": "norm", "block_size": 2, "segment_size": 6}),
    "flat": ("indexed_attention", {"top_k": 3}),
    "hierarchical": ("indexed_attention", {"top_k": 3, "indexer": "hierarchical", "block_size": 2, "candidates": 2}),
    "vote": ("indexed_attention", {"top_k": 3, "indexer": "vote"}),
    "period": ("sepllm", {"local_window": 2, "initial_tokens": 1, "period": 3, "block_size": 4}),
}


@pytest.mark.parametrize("variant", SPARSE)
@pytest.mark.parametrize("causal", [True, False])
def test_sparse_attention_packs(variant: str, causal: bool) -> None:
    """Blocks, segments, windows and choices begin with a document: it gets what it gets alone."""
    name, options = SPARSE[variant]
    mixer = checks.perturb(create_mixer(name, 32, causal=causal, **HEADS, **options)).eval()
    checks.check_packing(mixer, 32)
    # padding inside a document does not count
    x, ids = checks.tokens(1, 17, 32), torch.tensor([[0] * 5 + [1] * 12])
    mask = torch.ones(1, 17, dtype=torch.bool)
    mask[0, [2, 7, 8]] = False
    noisy = torch.where(mask[..., None], x, 50 * checks.tokens(1, 17, 32, seed=7))
    y = mixer(noisy, mask=mask, document_ids=ids)
    for at in (slice(0, 5), slice(5, 17)):
        checks.close(y[0, at][mask[0, at]], mixer(x[:, at][:, mask[0, at]])[0], 2e-4)


def test_separators_pack() -> None:
    mixer = checks.perturb(create_mixer("sepllm", 32, causal=True, local_window=2, initial_tokens=0, block_size=4))
    x, told = checks.tokens(2, 17, 32), torch.tensor(list(b"a, b. c, d, e; fg")).expand(2, -1)
    y = mixer(x, document_ids=torch.tensor([[0] * 6 + [1] * 11]).expand(2, -1), token_ids=told)
    parts = [mixer(x[:, at], token_ids=told[:, at]) for at in (slice(0, 6), slice(6, 17))]
    checks.close(y, torch.cat(parts, 1), 1e-5)


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

"""Sparse mixers: causal contract, equality with dense attention, orders on grids, and errors."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.attention.attention import Attention
from mixerzoo.mixers.attention.block_sparse import BlockSparseAttention, PermutedAttention
from mixerzoo.tests.mixers import sequence_checks as checks

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SEGMENTS = {"block_size": 4, "segment_size": 8, "head_dim": 8, "selector": "top_k"}
CAUSAL = {
    "top_k": (BlockSparseAttention, {"selector": {"name": "top_k", "keep": 2}, "block_size": 4, **HEADS}),
    "random": (BlockSparseAttention, {"selector": "random", "block_size": 3, "position": "rotary", "head_dim": 16}),
    "attention": (PermutedAttention, {"selector": "top_p", "block_size": 2, "segment_size": 6, **HEADS}),
    "norm": (PermutedAttention, {"permutation": "norm", **SEGMENTS}),
    "hash": (PermutedAttention, {"permutation": "hash", **SEGMENTS}),
}


@pytest.mark.parametrize("variant", CAUSAL)
def test_causal_contract(variant):
    cls, options = CAUSAL[variant]
    check_options(cls.name, options)


@pytest.mark.parametrize("variant", CAUSAL)
def test_values_of_the_future_change_nothing(variant):
    """A choice has no gradient: that later tokens do not change it shows only in values."""
    cls, options = CAUSAL[variant]
    mixer = checks.perturb(cls(32, causal=True, **options), std=0.5)
    x = checks.tokens(2, 40, 32)
    later = torch.cat([x[:, :23], 3 * checks.tokens(2, 17, 32, seed=4)], 1)
    torch.testing.assert_close(mixer(x)[:, :23], mixer(later)[:, :23], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["top_k", "attention"])
def test_bidirectional_padding(variant):
    cls, options = CAUSAL[variant]
    checks.check_padding(checks.perturb(cls(32, **options)), 32)


@pytest.mark.parametrize("cls", [BlockSparseAttention, PermutedAttention])
@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_are_attention(cls, causal):
    mixer = checks.perturb(cls(32, causal=causal, selector="dense", block_size=4, **HEADS))
    plain = Attention(32, causal=causal, **HEADS)
    plain.load_state_dict(mixer.state_dict())
    x = checks.tokens(2, 33, 32)
    checks.close(mixer(x), plain(x), 1e-5)


def test_orders_make_blocks_of_neighbours():
    """With the own block only, a token sees its window of 4 x 4 in the windowed order, a row in raster order."""
    spec = {"selector": {"name": "window", "width": 1, "sinks": 0}, "block_size": 16}
    windows = {"name": "atrous", "size": 4, "joined": True}
    mixer = create_mixer("block_sparse_attention", 32, order=windows, causal_paths=False, **spec)
    x = torch.randn(1, 16, 16, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0, 5, 6].square().sum(), x)
    seen = grad[0].abs().sum(-1) > 0
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 4:8] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("block_sparse_attention", {"block_size": 0}, "block_size"),
        ("block_sparse_attention", {"selector": "top_q"}, 'Did you mean "top_'),
        ("block_sparse_attention", {"selector": {"name": "top_k", "kep": 3}}, r"mixer\.selector\.kep"),
        ("permuted_attention", {"segment_size": 100}, "segment_size"),
        ("permuted_attention", {"permutation": "sorted"}, "permutation"),
    ],
)
def test_errors(name, options, match):
    with pytest.raises(ConfigError, match=match):
        create_mixer(name, 32, **options)

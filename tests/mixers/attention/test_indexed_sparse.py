"""Token selection and `indexed_attention`."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import collect_losses, create_mixer
from mixerzoo.mixers.attention.attention import Attention
from mixerzoo.mixers.attention.indexed_attention import INDEXERS, IndexedAttention
from mixerzoo.mixers.attention.sparsifiner import ConnectivityPredictor
from mixerzoo.mixers.attention.token_selection import (
    choose_by_vote,
    choose_flat,
    choose_hierarchical,
    index_scores,
    predicted_blocks,
)
from mixerzoo.tests.mixers import sequence_checks as checks

SMALL = {"top_k": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "index_dim": 8, "block_size": 3, "candidates": 3}


def index(length: int, heads: int = 2):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, length, heads, 8, generator=generator), torch.randn(2, length, 8, generator=generator)
    return q, k, torch.rand(2, length, heads, generator=generator)


def sets(chosen):
    """By batch element and query, the set of its tokens."""
    found = []
    for ids, valid in zip(chosen.ids, chosen.valid, strict=True):
        found.append([{int(i) for i in row[good]} for row, good in zip(ids, valid, strict=True)])
    return found


def test_flat_choice_is_the_sorted_scores():
    q, k, w = index(300)
    until = torch.arange(1, 301)[None]
    chosen = choose_flat(q, k, w, until, 5, None)
    scores = index_scores(q, k, w)
    for b, t in ((0, 2), (1, 299)):
        expected = scores[b, t, : t + 1].argsort(descending=True)[:5]
        assert sets(chosen)[b][t] == {int(i) for i in expected}
    assert chosen.work == 2 * 300 * 300


def test_hierarchical_choice():
    """With all blocks it is the flat one; with few it computes less and still finds what stands out."""
    q, k, w = index(300)
    k[:, 40] *= 4
    until = torch.arange(1, 301)[None]
    flat = choose_flat(q, k, w, until, 8, None)
    same = choose_hierarchical(q, k, w, until, 8, None, block_size=16, blocks=19)
    assert sets(same) == sets(flat)
    few = choose_hierarchical(q, k, w, until, 8, None, block_size=16, blocks=6)
    assert few.work == 2 * 300 * (19 + 96)
    both = [zip(*rows, strict=True) for rows in zip(sets(few), sets(flat), strict=True)]
    overlap = [len(a & b) / len(b) for rows in both for a, b in rows]
    assert 0.5 < sum(overlap) / len(overlap) < 1


def test_votes_count_heads_alike():
    """One head is sure of token 0; two heads agree less surely on token 2."""
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 4, 1, 4)
    k[0, 0, 0, 0] = k[0, 2, 0, 1] = 1.0
    q[0, 0, 0, 0], q[0, 0, 1:, 1] = 50.0, 2.0
    chosen = choose_by_vote(q, k, torch.tensor([[4]]), 1, None, 1.0)
    assert chosen.ids.tolist() == [[[2]]]


def test_predicted_blocks():
    predictor = ConnectivityPredictor(
        5, 4, 8, 4, num_heads=2, shared=False, budget=2, basis_threshold=0.0, coef_topk=0, coef_threshold=0.0,
        score_threshold=None,
    )  # fmt: skip
    mask = predicted_blocks(predictor, torch.randn(1, 20, 2, 8), torch.randn(1, 20, 1, 8), 4)
    assert mask.shape == (1, 2, 5, 5)
    assert (mask.sum(-1) == 2).all()


@pytest.mark.parametrize("indexer", INDEXERS)
def test_causal_contract(indexer):
    check_options("indexed_attention", {"indexer": indexer, **SMALL})
    mixer = checks.perturb(IndexedAttention(32, causal=True, indexer=indexer, **SMALL)).eval()
    x = checks.tokens(2, 30, 32)
    later = torch.cat([x[:, :17], 3 * checks.tokens(2, 13, 32, seed=4)], 1)
    torch.testing.assert_close(mixer(x)[:, :17], mixer(later)[:, :17], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_all_tokens_are_attention(causal):
    mixer = checks.perturb(IndexedAttention(32, causal=causal, **(SMALL | {"top_k": 40})))
    plain = Attention(32, causal=causal, num_heads=4, num_kv_heads=2, head_dim=8)
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("index_")})
    x = checks.tokens(2, 33, 32)
    checks.close(mixer(x), plain(x), 1e-5)
    checks.check_padding(mixer.eval(), 32)


def test_the_indexer_learns_to_rank_and_nothing_else_changes():
    torch.manual_seed(0)
    mixer = checks.perturb(IndexedAttention(32, **(SMALL | {"top_k": 24, "index_heads": 4})), std=0.3)
    x = checks.tokens(4, 24, 32).requires_grad_()
    grads = {}
    for mode in (True, False):
        mixer.train(mode)
        mixer.zero_grad()
        with collect_losses() as losses:
            y = mixer(x).square().sum()
        (grads[mode],) = torch.autograd.grad(sum(losses.values(), y), x)
        assert list(losses) == ["indexer"] * mode
    torch.testing.assert_close(grads[True], grads[False])
    mixer.train()

    def loss():
        tokens = x.detach()
        q, k, _ = mixer.project(tokens, None)
        index = mixer.index_of(tokens)
        return mixer.loss(q, k, index, mixer.choose(q, k, index, torch.full((1, 24), 24), None)).detach()

    first = float(loss())
    optimizer = torch.optim.Adam([p for n, p in mixer.named_parameters() if n.startswith("index_")], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        with collect_losses() as losses:
            mixer(x)
        losses["indexer"].backward()
        optimizer.step()
    assert float(loss()) < 0.7 * first


@pytest.mark.parametrize(("options", "match"), [({"indexer": "flats"}, "'flat'"), ({"top_k": 0}, "mixer.top_k")])
def test_errors(options, match):
    with pytest.raises(ConfigError, match=match):
        create_mixer("indexed_attention", 32, **options)

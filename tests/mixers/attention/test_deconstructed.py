"""The controlled variants of attention: each lacks what it says, and nothing else."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer, mixer_options
from mixerzoo.mixers.attention.attention import Attention
from mixerzoo.mixers.attention.deconstructed import Deconstructed
from mixerzoo.tests.mixers import sequence_checks as checks


def make(variant, **options):
    return checks.perturb(Deconstructed(16, variant=variant, head_dim=8, **options))


@pytest.mark.parametrize("variant", get_args(mixer_options("deconstructed")["variant"].annotation))
@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
def test_contract(variant, position):
    check_options("deconstructed", {"variant": variant, "position": position, "head_dim": 8})


def test_standard_is_attention():
    ours, attention = make("standard"), Attention(16, head_dim=8)
    attention.load_state_dict(ours.state_dict())
    x = checks.tokens(2, 9, 16)
    assert torch.equal(ours(x), attention(x))


def test_none_mixes_nothing():
    mixer = make("none")
    x = checks.tokens(1, 9, 16).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[0, 4].sum(), x)
    assert float(grad[0, 4].abs().max()) > 0
    grad[0, 4] = 0
    assert float(grad.abs().max()) == 0


def test_fixed_sequence_has_the_same_weights_for_all_inputs():
    """So the mixer is linear in its input."""
    mixer = make("fixed_sequence", causal=True)
    a, b = checks.tokens(1, 9, 16), checks.tokens(1, 9, 16, seed=2)
    checks.close(mixer(a + 2 * b), mixer(a) + 2 * mixer(b), 1e-5)
    standard = make("standard", causal=True)
    assert (standard(a + 2 * b) - standard(a) - 2 * standard(b)).abs().max() > 1e-2


def test_static_embedding_reads_weights_from_the_embeddings():
    """With the embeddings held, the mixer is linear in its input; they do change the weights."""
    mixer = make("static_embedding", causal=True)
    a, b, e = (checks.tokens(1, 9, 16, seed=s) for s in (1, 2, 3))
    checks.close(mixer(a + 2 * b, embeddings=e), mixer(a, embeddings=e) + 2 * mixer(b, embeddings=e), 1e-5)
    assert (mixer(a, embeddings=e) - mixer(a, embeddings=b)).abs().max() > 1e-3
    assert torch.equal(mixer(a), mixer(a, embeddings=a))


def test_linear_has_no_softmax():
    mixer = make("linear")
    x = checks.tokens(2, 9, 16)
    q, k, v = (t.transpose(1, 2) for t in mixer.project(x, None))
    phi = torch.nn.functional.elu
    weights = (phi(q) + 1) @ (phi(k) + 1).mT
    expected = (weights / weights.sum(-1, keepdim=True)) @ v
    checks.close(mixer(x), mixer.proj(expected.transpose(1, 2).flatten(2)), 1e-5)


def test_unknown_variant():
    with pytest.raises(ConfigError, match="fixed_sequence"):
        create_mixer("deconstructed", 16, variant="fixed_sequenz")

"""Softmax attention against the official implementations, closed forms, and the contract of causal mixers."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.attention.attention import Attention
from mixerzoo.mixers.attention.chunked_attention import Rule, attend
from mixerzoo.mixers.positions import alibi_slopes, positions_in_segment, rotate, segments
from mixerzoo.mixers.state import state_bytes
from mixerzoo.tests.mixers import sequence_checks as checks
from mixerzoo.tests.utils import check_golden, load_golden
from torch.utils._python_dispatch import TorchDispatchMode

VARIANTS = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "rotary": {"position": "rotary", "head_dim": 16, "qk_norm": True},
    "alibi": {"position": "alibi", "head_dim": 8, "num_kv_heads": 1},
    "window": {"window": 4, "head_dim": 16, "position": "rotary"},
    "sinks": {"window": 3, "sink_tokens": 2, "head_dim": 16, "position": "alibi"},
}


@pytest.mark.parametrize("name", ["metaformer_attention", "metaformer_attention_official"])
def test_golden(name):
    golden = load_golden(name)
    check_golden(golden, Attention(**golden.kwargs), Attention.convert_official)


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_contract(variant):
    options = VARIANTS[variant]
    check_options("attention", options)
    if "window" in options:
        checks.check_size_of_state(Attention(32, causal=True, **options), 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bidirectional_padding_and_packing(variant):
    mixer = checks.perturb(Attention(32, **VARIANTS[variant]))
    checks.check_padding(mixer, 32)
    checks.check_packing(mixer, 32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (5, 0), (5, 3), (130, 0), (130, 3)])
def test_attend_equals_dense(causal, window, sinks):
    """Chunks of queries against the N x N definition, over several chunks."""
    n, h, g, d = 300, 4, 2, 8
    q, k, v = torch.randn(2, n, h, d), torch.randn(2, n, g, d), torch.randn(2, n, g, d)
    slopes = alibi_slopes(h)
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    allowed = torch.ones(n, n, dtype=torch.bool) if not causal else distance >= 0
    if window is not None:
        allowed = allowed & ((distance.abs() < window) | (torch.arange(n)[None] < sinks))
    for use_slopes in (False, True):
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / d**0.5
        if use_slopes:
            scores = scores - slopes[:, None, None] * distance.abs()
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        expected = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
        y = attend(q, k, v, Rule(causal, window, sinks, slopes if use_slopes else None))
        checks.close(y, expected, 1e-5)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)

    def score(i, j):
        return (rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum(-1)

    checks.close(score(7, 3), score(107, 103), 1e-4)
    assert (score(7, 3) - score(8, 3)).abs().max() > 1e-3
    # the first pair of channels turns by one radian per position
    x = torch.zeros(1, 1, 1, 16)
    x[..., 0] = 1
    assert torch.allclose(rotate(x, torch.tensor([[1]]))[0, 0, 0, [0, 8]], torch.tensor([0.5403023, 0.8414710]))


def test_alibi_slopes():
    assert torch.allclose(alibi_slopes(8), 2.0 ** -torch.arange(1, 9))
    assert torch.allclose(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_segments():
    ids = torch.tensor([[4, 4, 1, 4, 4, 4]])
    assert segments(ids).tolist() == [[0, 0, 1, 2, 2, 2]]
    assert positions_in_segment(segments(ids)).tolist() == [[0, 1, 0, 0, 1, 2]]


def test_window_bounds_the_state():
    mixer = Attention(32, causal=True, window=8, sink_tokens=2)
    small = state_bytes(mixer.init_state(1))
    assert small == 10 * 2 * 32 * 4 + 10 * 8 + 8  # keys and values, positions, length
    _, state = mixer.prefill(torch.randn(1, 100, 32))
    assert state_bytes(state) == small


def test_work_of_the_gradient_of_a_window_grows_linearly():
    """Numbers that a backward pass writes: slices of the whole for every chunk would make it quadratic."""

    class Written(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "view" not in str(func) and "slice.T" not in str(func):
                self.total += result.numel()
            return result

    def written(length: int) -> int:
        q, k, v = (torch.randn(1, length, 1, 4, requires_grad=True) for _ in range(3))
        y = attend(q, k, v, Rule(True, 8, 2, None))
        with Written() as mode:
            torch.autograd.grad(y.sum(), (q, k, v))
        return mode.total

    assert written(4096) < 2.2 * written(2048)


def test_memory_of_window_grows_linearly():
    """No N x N: the chunks of a window of 16 over 4,096 tokens save less than a tenth of the dense mask."""
    mixer = Attention(8, causal=True, window=16, head_dim=8)
    saved = 0

    def count(tensor):
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        mixer(torch.randn(1, 4096, 8, requires_grad=True))
    assert saved < 4096 * 4096 // 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head_dim": 0}, "mixer.head_dim"),
        ({"num_heads": 3, "num_kv_heads": 2}, "mixer.num_kv_heads"),
        ({"sink_tokens": 2}, "window"),
        ({"window": 0}, "window"),
        ({"position": "rope"}, "mixer.position"),
        ({"position": "rotary", "head_dim": 5}, "mixer.head_dim"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ConfigError, match=match):
        create_mixer("attention", 32, **options)


def test_bidirectional_does_not_stream():
    with pytest.raises(ConfigError, match="causal"):
        Attention(32).init_state(1)

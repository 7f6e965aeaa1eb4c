"""`sepllm`: the definition, work, streams and errors. (Golden values: `test_sparse_selection.py`.)"""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.kernels.block_sparse_attention.blocks import mask_of_blocks
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.attention.attention import Attention
from mixerzoo.mixers.attention.sepllm import SepLLM, separator_blocks
from mixerzoo.tests.mixers import sequence_checks as checks

OPTIONS = {"local_window": 4, "initial_tokens": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 8}


@pytest.mark.parametrize("period", [0, 5])
def test_causal_contract(period):
    check_options("sepllm", {"period": period, "position": "rotary", **OPTIONS})


@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_masked_softmax(causal):
    mixer = checks.perturb(SepLLM(32, causal=causal, **OPTIONS))
    told = torch.randint(40, 55, (2, 45), generator=torch.Generator().manual_seed(0))
    x, separators = checks.tokens(2, 45, 32), (told == ord(",")) | (told == ord("."))
    q, k, v = mixer.project(x, None)
    place = torch.arange(45)
    gap = place[:, None] - place
    seen = (gap.abs() < 4) | (separators | (place < 2))[:, None, :]
    seen = seen & (gap >= 0) if causal else seen
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[:, None], enable_gqa=True)
    checks.close(mixer(x, token_ids=told), mixer.proj(y.transpose(1, 2).flatten(2)), 1e-5)
    if causal:
        stepped, state = mixer.prefill(x[:, :30], token_ids=told[:, :30])
        rest, _ = mixer.prefill(x[:, 30:], state=state, token_ids=told[:, 30:])
        checks.close(torch.cat([stepped, rest], 1), mixer(x, token_ids=told), 1e-5)
    checks.check_padding(mixer, 32)


def test_without_separators_it_is_a_window_with_sinks():
    mixer = checks.perturb(SepLLM(32, causal=True, **OPTIONS))
    plain = Attention(32, causal=True, window=4, sink_tokens=2, num_heads=4, num_kv_heads=2, head_dim=8)
    plain.load_state_dict(mixer.state_dict())
    x = checks.tokens(2, 33, 32)
    checks.close(mixer(x), plain(x), 1e-5)


def test_work_is_that_of_the_window_and_the_separators():
    """1024 tokens, every 16th stays: 64 of them fill 4 blocks of 16, the window of 32 touches 4 or so."""
    stays = torch.arange(1024)[None] % 16 == 15
    _, blocks = separator_blocks(stays, 32, 16, True)
    lists = mask_of_blocks(blocks, 64)[0, 0].sum(-1)
    assert int(lists.max()) <= 9


@pytest.mark.parametrize(("options", "match"), [({"local_window": 0}, "local_window"), ({"period": -1}, "period")])
def test_errors(options, match):
    with pytest.raises(ConfigError, match=match):
        create_mixer("sepllm", 32, **options)
    with pytest.raises(ConfigError, match="token_ids"):
        SepLLM(32)(torch.zeros(1, 5, 32), token_ids=torch.zeros(1, 4, dtype=torch.int64))

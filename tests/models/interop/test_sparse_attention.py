"""The plug-in for Hugging Face models."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models.interop.sparse_attention import use_sparse_attention
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOCKS = {"block_size": 8, "segment_size": 16}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", ["permuted", "mean_pooling"])
@torch.no_grad()
def test_threshold_one_is_dense_and_less_is_not(model, method):
    ids = torch.randint(0, 50, (2, 75))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    dense, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    short = model(ids[:, :16]).logits
    use_sparse_attention(model, method=method, threshold=1.0, **BLOCKS)
    torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], padded[mask.bool()], rtol=1e-4, atol=1e-4)
    use_sparse_attention(model, method=method, threshold=0.3, **BLOCKS)
    sparse = model(ids).logits
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, dense, atol=1e-2)
    torch.testing.assert_close(model(ids[:, :16]).logits, short)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 78)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, dense)


@torch.no_grad()
def test_sliding_windows_stay_as_they_are():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)).eval()
    ids = torch.randint(0, 50, (1, 40))
    expected = model(ids).logits
    torch.testing.assert_close(use_sparse_attention(model, threshold=0.3, **BLOCKS)(ids).logits, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "permute"}, 'Did you mean "permuted"'),
        ({"threshold": 0.0}, "threshold"),
        ({"segment_size": 200}, "segment_size"),
    ],
)
def test_errors(model, options, match):
    with pytest.raises(ConfigError, match=match):
        use_sparse_attention(model, **options)

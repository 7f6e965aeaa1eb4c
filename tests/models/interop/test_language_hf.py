"""The Hugging Face wrapper: auto classes, files, generation with our states."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import generate
from mixerzoo.models.interop.huggingface import MixerZooConfig, MixerZooForCausalLM
from torch.nn import functional as F

CONFIG = {
    "backbone": "language",
    "vocab_size": 17,
    "dim": 32,
    "depth": 4,
    "mixer": [
        {"name": "mamba2", "d_state": 8},
        {"name": "attention", "window": 6},
        {"name": "linear_attention", "decay": "retention"},
        {"name": "long_conv", "l_max": 64},
    ],
    "position": "rotary",
    "channel_mixer": "gated_mlp",
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    wrapper = MixerZooForCausalLM.from_name(CONFIG).eval()
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return wrapper


def padded():
    ids, mask = torch.randint(0, 17, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return ids, mask


def test_save_and_load(model, tmp_path):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, MixerZooForCausalLM)
    ids, mask = padded()
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert again.config.hidden_size == 32


def test_fresh_model_keeps_the_published_initial_values(tmp_path):
    """transformers initialises what it does not know; here it must not touch anything."""
    model = MixerZooForCausalLM(MixerZooConfig(mixerzoo={**CONFIG, "mixer": "mamba", "position": "none"}))
    a = model.model.blocks[0].mixer.A_log.exp()
    assert torch.allclose(a, torch.arange(1.0, 17.0).expand_as(a))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_and_without_state(model, beams):
    ids, mask = padded()
    options = {"max_new_tokens": 7, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with_state = model.generate(ids, attention_mask=mask, **options)
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_state, without)
    if beams == 1:
        ours = generate(model.model, ids, mask=mask.bool(), max_new_tokens=7, temperature=0)
        assert torch.equal(with_state[:, 9:], ours)


def test_loss_is_shifted(model):
    ids, _ = padded()
    labels = ids.clone()
    labels[0, 3] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, expected)
    loss, logits = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)


def test_errors():
    with pytest.raises(ConfigError, match="mixerzoo"):
        MixerZooForCausalLM(MixerZooConfig())
    with pytest.raises(ConfigError, match="causal_lm"):
        MixerZooForCausalLM.from_name("fnet_tiny")

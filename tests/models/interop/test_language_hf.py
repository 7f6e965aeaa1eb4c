"""The Hugging Face wrappers: auto classes, files, what transformers passes, generation with our states."""

from __future__ import annotations

import json

import pytest
import torch
from mixerzoo import create_model, list_mixers
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import mixer_class
from mixerzoo.models import build_model, generate, init_weights
from mixerzoo.models.interop.huggingface import (
    MixerZooConfig,
    MixerZooForCausalLM,
    MixerZooForImageClassification,
    MixerZooForMaskedLM,
    MixerZooForSequenceClassification,
)
from safetensors.torch import load_file, save_file
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
PACKS = {**CONFIG, "depth": 3, "mixer": CONFIG["mixer"][:3]}
ENCODER = {
    "backbone": "language", "vocab_size": 17, "dim": 16, "depth": 2, "mixer": "attention", "causal": False,
    "objective": "masked_lm",
}  # fmt: skip
VISION = {
    "backbone": "pyramid", "dims": [8, 16], "depths": [1, 1], "mixer": "pooling", "image_size": 32, "num_classes": 5,
    "stem": {"name": "conv", "kernel_size": 4, "stride": 4},
    "downsample": {"name": "conv", "kernel_size": 2, "stride": 2},
}  # fmt: skip


def randomised(wrapper):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapper.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomised(MixerZooForCausalLM.from_name(CONFIG))


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
    # who has not imported mixerzoo finds it by way of the folder
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_mixerzoo.MixerZooConfig",
        "AutoModelForCausalLM": "modeling_mixerzoo.MixerZooForCausalLM",
    }
    names: dict = {}
    exec((tmp_path / "modeling_mixerzoo.py").read_text(), names)
    assert names["MixerZooForCausalLM"] is MixerZooForCausalLM


def causal_mixers():
    return [n for n in list_mixers(streams=True) if 1 in mixer_class(n).axes and mixer_class(n).causal != "cannot"]


@pytest.mark.parametrize("name", causal_mixers())
def test_every_mixer_loads_as_in_a_fresh_process(name, tmp_path):
    """What PyTorch remembers of its first use of a device as a context hides faults: it is forgotten before."""
    config = {"backbone": "language", "vocab_size": 17, "dim": 32, "depth": 1, "mixer": name, "sequence_length": 16}
    torch.manual_seed(0)
    model = MixerZooForCausalLM.from_name(config).eval()
    model.save_pretrained(tmp_path)
    torch.utils._device._device_constructors.cache_clear()
    again = MixerZooForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 17, (1, 16))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "tie_embeddings": False, "position": "none"}])
def test_what_a_file_lacks_starts_fresh(config, tmp_path):
    model = randomised(MixerZooForCausalLM.from_name(config))
    model.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}  # the file is written anew
    lacking = [k for k in state if k.startswith(("model.blocks.0", "model.blocks.3.mixer", "model.head"))]
    save_file({k: v for k, v in state.items() if k not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    again = MixerZooForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = build_model(config).state_dict()
    for key, value in again.state_dict().items():
        if key not in lacking:
            assert torch.equal(value, state[key]), key
            continue
        expected = fresh[key.removeprefix("model.")]
        assert value.isfinite().all(), key
        assert not torch.equal(value, state[key]), key
        # random values are others, but as large; what is not random is the same
        spread, usual = (float(t.std(correction=0)) for t in (value, expected))
        assert spread == pytest.approx(usual, rel=0.5, abs=1e-6), key
        assert float(value.mean()) == pytest.approx(float(expected.mean()), rel=0.5, abs=0.1 + usual), key


@pytest.mark.parametrize("config", [CONFIG, ENCODER, VISION, "vim_tiny", "stripmlp_tiny_light", "affnet_tiny"])
def test_init_weights_after_to_empty(config):
    options = {"depth": 1} if config == "vim_tiny" else {"image_size": 64} if isinstance(config, str) else {}
    with torch.device("meta"):
        model = create_model(config, **options)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(77)
    torch.manual_seed(3)
    init_weights(model)
    torch.manual_seed(3)
    expected = create_model(config, **options)
    for (key, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    if isinstance(config, dict) and config["backbone"] == "language":
        ids = torch.randint(0, 17, (1, 5))
        assert torch.equal(model.eval()(ids), expected.eval()(ids))


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


@pytest.mark.parametrize("how", ["prompt", "assistant", "itself"])
def test_drafts_change_nothing(model, how):
    """Assisted and prompt-lookup decoding give what greedy decoding gives: states roll back."""
    ids = torch.randint(1, 5, (1, 12)).repeat(1, 2)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    other = randomised(MixerZooForCausalLM.from_name({**CONFIG, "depth": 1}))
    drafts = {
        "prompt": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": other},
        "itself": {"assistant_model": MixerZooForCausalLM.wrap(model.model).eval()},
    }
    assert torch.equal(model.generate(ids, **options, **drafts[how]), expected)


def test_a_cache_rolls_back(model):
    ids = torch.randint(0, 17, (2, 12))
    whole = model(ids).logits
    cache = model(ids[:, :6], use_cache=True).cache
    cache.activate_past_recording()
    model(ids[:, 6:9].flip(0), cache=cache)  # drafts
    model(ids[:, 9:10], cache=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(model(ids[:, 6:9], cache=cache).logits, whole[:, 6:9], rtol=1e-4, atol=1e-4)
    cache.crop(7)  # two of three are taken back: the first one is read again with the next
    torch.testing.assert_close(model(ids[:, 7:], past_key_values=cache).logits, whole[:, 7:], rtol=1e-4, atol=1e-4)


def test_logits_of_all_tokens_with_a_cache(model):
    ids, mask = padded()
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    second = model(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    seen = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(seen[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=torch.tensor([3])).logits, whole[:, 3:4])


def test_embeddings_and_hidden_states(model):
    ids, _ = padded()
    embeds = model.get_input_embeddings()(ids)
    out = model(inputs_embeds=embeds, output_hidden_states=True)
    torch.testing.assert_close(out.logits, model(ids).logits)
    assert len(out.hidden_states) == 5
    torch.testing.assert_close(out.hidden_states[0], embeds)
    torch.testing.assert_close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    cached = model(ids, use_cache=True, output_hidden_states=True)
    for a, b in zip(out.hidden_states, cached.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    # without a mask transformers would take the tokens 0 of the ids for padding
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 9:])


def test_positions_pack_documents():
    torch.manual_seed(0)
    model = randomised(MixerZooForCausalLM.from_name(PACKS))
    ids = torch.randint(0, 17, (1, 9))
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids, position_ids=torch.arange(9)[None]).logits, model(ids).logits)


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
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=40).loss, expected * count / 40)


def test_hooks_of_blocks_fire_in_generate(model):
    calls = [0] * 4
    for i, block in enumerate(model.model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    model.generate(torch.randint(0, 17, (1, 5)), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert calls == [6] * 4  # the prompt, and five steps


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [12, 24])
def test_resize_token_embeddings(tied, count, tmp_path):
    model = randomised(MixerZooForCausalLM.from_name({**CONFIG, "tie_embeddings": tied}))
    ids = torch.randint(0, 12, (1, 6))
    before = model(ids).logits
    model.resize_token_embeddings(count)
    after = model(ids).logits
    assert after.shape[-1] == count == model.config.vocab_size
    kept = min(count, 17)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    assert torch.equal(MixerZooForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, after)


def test_other_kinds_of_models(tmp_path):
    from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForSequenceClassification

    ids, mask = padded()
    masked = randomised(MixerZooForMaskedLM.from_name(ENCODER))
    masked.save_pretrained(tmp_path / "masked")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "masked").eval()
    labels = torch.where(mask.bool(), ids, -100)
    out = again(ids, attention_mask=mask, labels=labels)
    assert torch.equal(out.logits, masked.model(ids, mask=mask.bool()))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))

    texts = randomised(
        MixerZooForSequenceClassification.from_name({**ENCODER, "objective": "classify", "num_classes": 3})
    )
    texts.save_pretrained(tmp_path / "texts")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "texts").eval()
    out = again(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert torch.equal(out.logits, texts.model(ids, mask=mask.bool()))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([0, 2])))

    images = randomised(MixerZooForImageClassification.from_name(VISION))
    images.save_pretrained(tmp_path / "images")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "images").eval()
    x = torch.randn(2, 3, 32, 32)
    out = again(x, labels=torch.tensor([1, 4]), output_hidden_states=True)
    torch.testing.assert_close(out.logits, images.model(x))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([1, 4])))
    assert [h.shape[1] for h in out.hidden_states] == [8, 16]
    assert again.config.num_labels == 5


def test_lora(model):
    peft = pytest.importorskip("peft")
    ids, _ = padded()
    expected = model(ids).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    adapted = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)
    trained = adapted(input_ids=ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, trained, rtol=1e-3, atol=1e-4)


def test_errors(model):
    with pytest.raises(ConfigError, match="mixerzoo"):
        MixerZooForCausalLM(MixerZooConfig())
    with pytest.raises(ConfigError, match="causal_lm"):
        MixerZooForCausalLM.from_name("fnet_tiny")
    ids, _ = padded()
    with pytest.raises(TypeError, match=r"'atention_mask'.*Did you mean \"attention_mask\""):
        model(ids, atention_mask=torch.ones(2, 9))
    with pytest.raises(ConfigError, match="output_attentions"):
        model(ids, output_attentions=True)

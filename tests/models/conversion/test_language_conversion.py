"""Language models against the official numbers and against transformers' models with random weights."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model, save_model
from mixerzoo.models.conversion.language import _convert_mamba
from mixerzoo.models.interop.huggingface import MixerZooForCausalLM  # hides the folder `kernels` from transformers
from mixerzoo.tests.utils import load_golden, relative_error
from safetensors.torch import save_file

RMS = {"name": "rms_norm", "eps": 1e-5}


def mamba_config(kwargs, name):
    if name.startswith("mamba1"):
        mixer = {"name": "mamba", "dt_rank": kwargs["time_step_rank"]}
    else:
        mixer = {"name": "mamba2", "head_dim": kwargs["head_dim"], "ngroups": kwargs["n_groups"]}
    mixer.update(
        d_state=kwargs["state_size"],
        d_conv=kwargs["conv_kernel"],
        expand=kwargs["expand"],
        bias=kwargs["use_bias"],
        conv_bias=kwargs["use_conv_bias"],
    )
    return {
        "backbone": "language",
        "vocab_size": kwargs["vocab_size"],
        "dim": kwargs["hidden_size"],
        "depth": kwargs["num_hidden_layers"],
        "mixer": mixer,
        "norm": {"name": "rms_norm", "eps": kwargs["layer_norm_epsilon"]},
        "tie_embeddings": kwargs["tie_word_embeddings"],
    }


@pytest.mark.parametrize("name", ["mamba1_lm", "mamba2_lm"])
def test_golden(name, tmp_path):
    golden = load_golden(name)
    save_file(golden.params, tmp_path / "model.safetensors")
    config = mamba_config(golden.kwargs, name)
    model = create_model(config, checkpoint=tmp_path / "model.safetensors")
    logits = model(golden["input.input_ids"])
    assert relative_error(logits, golden["output.logits"]) < 1e-5
    (logits * golden["cotangent.logits"]).sum().backward()
    expected = _convert_mamba(golden.group("grad.param"), config)
    assert set(expected) == {n for n, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[key]) < 2e-5, key


def save_official(model, path):
    """A file as transformers writes it; tied matrices are in it once. Random values in place of zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tied = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    skipped = tied if model.config.tie_word_embeddings else set()
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k not in skipped and v.is_floating_point()}
    save_file(state, path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "llama"])
def test_transformers_decoders(kind, tied, tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "tie_word_embeddings": tied}
    config = {"backbone": "language", "vocab_size": 40, "dim": 32, "depth": 3, "norm": RMS, "tie_embeddings": tied}
    if kind == "mamba":
        official = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=8))
        config["mixer"] = {"name": "mamba", "d_state": 8}
    elif kind == "mamba2":
        official = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**sizes, num_heads=4, head_dim=16, n_groups=2, state_size=8, chunk_size=8)
        )
        config["mixer"] = {"name": "mamba2", "d_state": 8, "head_dim": 16, "ngroups": 2}
    else:
        official = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **sizes, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5
            )
        )
        config["mixer"] = {"name": "attention", "head_dim": 8, "num_kv_heads": 2}
        config["channel_mixer"] = {"name": "gated_mlp", "hidden": 48}
        config["position"] = "rotary"
    official.eval()
    save_official(official, tmp_path / "model.safetensors")
    model = create_model(config, checkpoint=tmp_path / "model.safetensors").eval()
    ids = torch.randint(0, 40, (2, 21))
    with torch.no_grad():
        theirs = official(ids).logits
        assert float((model(ids) - theirs).abs().max()) <= 1e-4
        assert float(theirs.abs().max()) > 0.1
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[1, :6] = 0
        padded = official(ids, attention_mask=mask).logits
        assert float((model(ids, mask=mask.bool()) - padded)[mask.bool()].abs().max()) <= 1e-4
    # our own file holds the configuration and gives the same model
    save_model(model, tmp_path / "ours.safetensors")
    again = create_model(config, checkpoint=tmp_path / "ours.safetensors")
    assert torch.equal(again.eval()(ids), model(ids))
    # and transformers' generate agrees with itself on both
    wrapped = MixerZooForCausalLM.wrap(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ours = wrapped.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours, official.generate(ids, attention_mask=mask, eos_token_id=None, **options))


def test_transformers_fnet(tmp_path):
    import transformers

    torch.manual_seed(0)
    official = transformers.FNetForMaskedLM(
        transformers.FNetConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=24
        )
    ).eval()
    save_official(official, tmp_path / "model.safetensors")
    model = create_model(
        "fnet_base",
        checkpoint=tmp_path / "model.safetensors",
        vocab_size=40,
        dim=32,
        depth=2,
        sequence_length=24,
        channel_mixer={"name": "mlp", "hidden": 48, "act": "gelu_tanh"},
    ).eval()
    ids = torch.randint(0, 40, (2, 17))
    types = torch.randint(0, 4, (2, 17))
    with torch.no_grad():
        theirs = official(ids, token_type_ids=types).logits
        assert float((model(ids, token_types=types) - theirs).abs().max()) <= 1e-4


def test_untied_head_into_a_tied_model(tmp_path):
    golden = load_golden("mamba2_lm")
    save_file(golden.params, tmp_path / "model.safetensors")
    config = {**mamba_config(golden.kwargs, "mamba2_lm"), "tie_embeddings": True}
    with pytest.raises(ConfigError, match="tie_embeddings"):
        create_model(config, checkpoint=tmp_path / "model.safetensors")


def test_another_depth_is_reported(tmp_path):
    golden = load_golden("mamba1_lm")
    save_file(golden.params, tmp_path / "model.safetensors")
    config = {**mamba_config(golden.kwargs, "mamba1_lm"), "depth": 3}
    with pytest.raises(ConfigError, match=r"blocks\.2"):
        create_model(config, checkpoint=tmp_path / "model.safetensors")

"""Language models against the official numbers and against transformers' models with random weights."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model, model_config, save_model
from mixerzoo.models.conversion.language import _convert_mamba
from mixerzoo.models.interop.huggingface import MixerZooForCausalLM  # hides the folder `kernels` from transformers
from mixerzoo.tests.utils import load_golden, relative_error
from safetensors.torch import save_file
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

RMS = {"name": "rms_norm", "eps": 1e-5}
# Transformers' first versions 5 norm Mamba-2 over all channels, not over each group as published: one group is right.
GROUPS = 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1


def mamba_config(kwargs, name):
    if name.startswith("mamba1"):
        mixer = {"name": "mamba", "dt_rank": kwargs["time_step_rank"]}
    else:
        mixer = {"name": "mamba2", "head_dim": kwargs["head_dim"], "ngroups": kwargs["n_groups"]}
        mixer["norm_eps"] = kwargs["layer_norm_epsilon"]
        if "time_step_limit" in kwargs:
            mixer["dt_limit"] = [float(edge) for edge in kwargs["time_step_limit"]]
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
            transformers.Mamba2Config(**sizes, num_heads=4, head_dim=16, n_groups=GROUPS, state_size=8, chunk_size=8)
        )
        config["mixer"] = {"name": "mamba2", "d_state": 8, "head_dim": 16, "ngroups": GROUPS}
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
    embedding = golden["param.backbone.embeddings.weight"]
    save_file({**golden.params, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    config = {**mamba_config(golden.kwargs, "mamba2_lm"), "tie_embeddings": True}
    with pytest.raises(ConfigError, match="tie_embeddings"):
        create_model(config, checkpoint=tmp_path / "model.safetensors")


def test_another_depth_is_reported(tmp_path):
    golden = load_golden("mamba1_lm")
    save_file(golden.params, tmp_path / "model.safetensors")
    depth = golden.kwargs["num_hidden_layers"]
    config = {**mamba_config(golden.kwargs, "mamba1_lm"), "depth": depth + 1}
    with pytest.raises(ConfigError, match=rf"blocks\.{depth}"):
        create_model(config, checkpoint=tmp_path / "model.safetensors")


LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
OUR_LLAMA = {
    "backbone": "language", "vocab_size": 40, "dim": 32, "depth": 2, "norm": RMS, "position": "rotary",
    "mixer": {"name": "attention", "head_dim": 8, "num_kv_heads": 2},
    "channel_mixer": {"name": "gated_mlp", "hidden": 48}, "tie_embeddings": False,
}  # fmt: skip
MAMBA2 = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": GROUPS,
    "state_size": 8, "chunk_size": 8, "tie_word_embeddings": True,
}  # fmt: skip
OUR_MAMBA2 = {
    "backbone": "language", "vocab_size": 40, "dim": 32, "depth": 2, "norm": RMS,
    "mixer": {"name": "mamba2", "d_state": 8, "head_dim": 16, "ngroups": GROUPS},
}  # fmt: skip
MAMBA = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "tie_word_embeddings": True}
OUR_MAMBA = {**OUR_MAMBA2, "mixer": {"name": "mamba", "d_state": 8}}
FNET = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 24
}  # fmt: skip
OUR_FNET = {
    **{k: v for k, v in model_config("fnet_base").items() if k != "channel_mixer"}, "vocab_size": 40, "dim": 32,
    "depth": 2, "sequence_length": 24, "channel_mixer": {"name": "mlp", "hidden": 48, "act": "gelu_tanh"},
}  # fmt: skip
KINDS = {
    "Llama": (LLAMA, OUR_LLAMA),
    "Mistral": ({**LLAMA, "sliding_window": None}, OUR_LLAMA),
    "Mamba2": (MAMBA2, OUR_MAMBA2),
    "Mamba": (MAMBA, OUR_MAMBA),
    "FNet": (FNET, OUR_FNET),
}


def released(kind, folder, **changes):
    """A folder as `save_pretrained` writes it, of a small random model."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**KINDS[kind][0], **changes})
    head = "ForMaskedLM" if kind == "FNet" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers(kind, tmp_path):
    official = released(kind, tmp_path)
    model = create_model(KINDS[kind][1], checkpoint=tmp_path).eval()
    ids = torch.randint(0, 40, (2, 15))
    with torch.no_grad():
        assert float((model(ids) - official(ids).logits).abs().max()) <= 1e-4


DISAGREEMENTS = [
    ("Llama", {"rms_norm_eps": 1e-6}, {}, r"norm\.eps is 1e-06 there, 1e-05 in the model"),
    ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1}, {}, r"mixer\.head_dim is 16 there, 8 in the model"),
    ("Llama", {"num_key_value_heads": 4}, {}, r"mixer\.num_kv_heads is 4 there, 2 in the model"),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, "rope_theta is 500000.0 there"),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, {},
     r"rope_scaling is \{'rope_type': 'linear', 'factor': 2.0\} there, 'none' in the model"),
    ("Llama", {"hidden_act": "gelu"}, {}, r"channel_mixer\.act is 'gelu' there, 'silu' in the model"),
    ("Llama", {"num_hidden_layers": 3}, {}, "depth is 3 there, 2 in the model"),
    ("Llama", {"tie_word_embeddings": True}, {}, "tie_embeddings is True there, False in the model"),
    ("Llama", {}, {"position": "none"}, "position is 'rotary' there, 'none' in the model"),
    ("Mistral", {"sliding_window": 8}, {}, r"mixer\.window is 8 there, 'none' in the model"),
    ("Mamba2", {"layer_norm_epsilon": 1e-3}, {}, r"norm\.eps is 0.001 there.*mixer\.norm_eps is 0.001 there"),
    ("Mamba2", {"time_step_limit": (0.0, 0.05)}, {}, r"mixer\.dt_limit is \(0.0, 0.05\) there, \(0.0, inf\)"),
    ("Mamba2", {"num_heads": 8, "head_dim": 8}, {}, r"mixer\.head_dim is 8 there, 16 in the model"),
    ("Mamba2", {"n_groups": 4}, {}, rf"mixer\.ngroups is 4 there, {GROUPS} in the model"),
    ("Mamba", {"layer_norm_epsilon": 1e-3}, {}, r"norm\.eps is 0.001 there, 1e-05 in the model"),
    ("Mamba", {"hidden_act": "gelu"}, {}, "the activation is 'gelu' there, 'silu' in the model"),
    ("FNet", {"layer_norm_eps": 1e-5}, {}, r"norm\.eps is 1e-05 there, 1e-12 in the model"),
    ("FNet", {"hidden_act": "gelu"}, {}, r"channel_mixer\.act is 'gelu' there, 'gelu_tanh' in the model"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "theirs", "ours", "message"), DISAGREEMENTS)
def test_what_the_weights_do_not_show(kind, theirs, ours, message, tmp_path):
    """`config.json` beside the weights is held against the model, and both values are said."""
    released(kind, tmp_path, **theirs)
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ConfigError, match=message):
            create_model({**KINDS[kind][1], **ours}, checkpoint=checkpoint)


def test_what_agrees_loads(tmp_path):
    """The same values in our words: the numbers are theirs."""
    changes = {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    official = released("Llama", tmp_path / "llama", **changes)
    mixer = {"name": "attention", "head_dim": 8, "num_kv_heads": 2, "rope_theta": 500.0}
    eps = {"name": "rms_norm", "eps": 1e-3}
    llama = create_model({**OUR_LLAMA, "mixer": mixer, "norm": eps}, checkpoint=tmp_path / "llama").eval()
    official2 = released("Mamba2", tmp_path / "mamba2", layer_norm_epsilon=1e-3, time_step_limit=(0.01, 0.05))
    mixer2 = {**OUR_MAMBA2["mixer"], "norm_eps": 1e-3, "dt_limit": [0.01, 0.05]}
    mamba2 = create_model({**OUR_MAMBA2, "mixer": mixer2, "norm": eps}, checkpoint=tmp_path / "mamba2").eval()
    ids = torch.randint(0, 40, (2, 15))
    with torch.no_grad():
        assert float((llama(ids) - official(ids).logits).abs().max()) <= 1e-4
        assert float((mamba2(ids) - official2(ids).logits).abs().max()) <= 1e-4


def test_a_family_that_computes_otherwise(tmp_path):
    """Gemma has the names of Llama's weights, but scales its embeddings and adds one to the weights of its norms."""
    released("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(ConfigError, match='model_type "gemma", which computes otherwise'):
        create_model(OUR_LLAMA, checkpoint=tmp_path)


def test_state_spaces_own_configuration(tmp_path):
    golden = load_golden("mamba2_lm")
    config = mamba_config(golden.kwargs, "mamba2_lm")
    save_file(golden.params, tmp_path / "model.safetensors")
    theirs = {"d_model": golden.kwargs["hidden_size"], "n_layer": golden.kwargs["num_hidden_layers"]}
    theirs |= {"vocab_size": golden.kwargs["vocab_size"], "pad_vocab_size_multiple": 1, "rms_norm": True}
    theirs["ssm_cfg"] = {"layer": "Mamba2", "headdim": golden.kwargs["head_dim"], "ngroups": golden.kwargs["n_groups"]}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    eps = golden.kwargs["layer_norm_epsilon"]
    if eps == 1e-5:
        create_model(config, checkpoint=tmp_path)
    deeper = golden.kwargs["num_hidden_layers"] + 1
    (tmp_path / "config.json").write_text(json.dumps({**theirs, "n_layer": deeper}))
    with pytest.raises(ConfigError, match=f"depth is {deeper} there"):
        create_model(config, checkpoint=tmp_path)

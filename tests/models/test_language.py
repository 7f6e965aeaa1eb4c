"""The language backbone: shapes, decoding, padding, packing, initial values, sizes, and what it says of bad input."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import list_mixers, mixer_class, mixer_options
from mixerzoo.models import create_model, generate, list_models, pad_prompts
from mixerzoo.models.backbones.language import Language
from mixerzoo.models.generation import filter_logits, sample
from mixerzoo.models.registry import model_config
from torch.nn import functional as F

BASE = {"backbone": "language", "vocab_size": 17, "dim": 32, "depth": 2, "channel_mixer": "gated_mlp"}
PATTERN = [{"name": "mamba2", "d_state": 8}, "mamba", {"name": "attention", "window": 6, "sink_tokens": 1}, "delta"]


def build(noise: float = 0.1, **changes) -> Language:
    torch.manual_seed(0)
    model = create_model({**BASE, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


MODELS = {
    "hybrid": {"mixer": PATTERN, "depth": 6, "position": "rotary"},
    "learned": {"mixer": "attention", "position": "learned", "sequence_length": 64},
    "alibi": {"mixer": "attention", "position": "alibi", "tie_embeddings": False},
    "post": {"mixer": ["linear_attention", "base_conv"], "norm_placement": "post", "norm": "layer_norm"},
    "separators": {
        "mixer": {
            "name": "sepllm",
            "local_window": 2,
            "initial_tokens": 1,
            "separator_token_ids": [3, 5],
            "head_dim": 8,
        }
    },
    "static": {"mixer": {"name": "deconstructed", "variant": "static_embedding"}, "position": "rotary"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_steps_and_prefill_equal_forward(kind):
    model = build(**MODELS[kind])
    ids = torch.randint(0, 17, (2, 40))
    with torch.no_grad():
        logits = model(ids)
        assert logits.shape == (2, 40, 17)
        state = model.init_state(2)
        for t in range(40):
            out, state = model.step(ids[:, t], state)
            torch.testing.assert_close(out, logits[:, t], rtol=1e-4, atol=1e-4)
        out, state = model.prefill(ids[:, :11])
        torch.testing.assert_close(out, logits[:, 10], rtol=1e-4, atol=1e-4)
        out, state = model.prefill(ids[:, 11:30], state=state)
        torch.testing.assert_close(out, logits[:, 29], rtol=1e-4, atol=1e-4)
        out, _ = model.step(ids[:, 30], state)
        torch.testing.assert_close(out, logits[:, 30], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind):
    """Logits, and generated tokens, of prompts of three lengths: what they are alone, padded on either side."""
    model = build(**MODELS[kind])
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    alone = [generate(model, p, max_new_tokens=9, temperature=0)[0] for p in prompts]
    for side in ("left", "right"):
        ids, mask = pad_prompts(prompts, side=side, padding_id=16)
        with torch.no_grad():
            logits = model(ids, mask=mask)
            for row, prompt in enumerate(prompts):
                torch.testing.assert_close(
                    logits[row, mask[row]], model(torch.tensor([prompt]))[0], rtol=1e-4, atol=1e-4
                )
        together = generate(model, ids, mask=mask, max_new_tokens=9, temperature=0)
        for row in range(3):
            assert torch.equal(together[row], alone[row])


@pytest.mark.parametrize("kind", MODELS)
def test_packed_documents_equal_single_ones(kind):
    model = build(**MODELS[kind])
    ids = torch.randint(0, 17, (1, 20))
    documents = torch.tensor([[0] * 7 + [1] * 5 + [2] * 8])
    with torch.no_grad():
        logits = model(ids, document_ids=documents)
        for start, stop in ((0, 7), (7, 12), (12, 20)):
            torch.testing.assert_close(logits[:, start:stop], model(ids[:, start:stop]), rtol=1e-4, atol=1e-4)


def test_pattern_repeats_to_the_depth():
    model = build(mixer=["mamba2", "mamba2", "attention"], depth=7)
    names = [block.mixer.name for block in model.blocks]
    assert names == ["mamba2", "mamba2", "attention", "mamba2", "mamba2", "attention", "mamba2"]


def test_heads():
    ids = torch.randint(0, 17, (2, 9))
    encoder = {"mixer": "attention", "causal": False}
    assert build(**encoder, objective="masked_lm")(ids).shape == (2, 9, 17)
    assert build(**encoder, objective="features")(ids).shape == (2, 9, 32)
    assert build(mixer="mamba", objective="features", pool="last")(ids).shape == (2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    for pool in ("mean", "last", "first"):
        for causal in (True, False):
            model = build(mixer="attention", causal=causal, objective="classify", num_classes=3, pool=pool)
            logits = model(ids, mask=mask)
            assert logits.shape == (2, 3)
            torch.testing.assert_close(logits[1:], model(ids[1:, :5]), rtol=1e-4, atol=1e-5)


def test_encoder_sees_both_sides():
    model = build(mixer="attention", causal=False, objective="features")
    x = model(torch.tensor([[1, 2, 3, 4]]))
    assert not torch.allclose(x[0, 0], model(torch.tensor([[1, 2, 3, 5]]))[0, 0])


def test_tied_and_untied_heads():
    tied, untied = build(mixer="mamba"), build(mixer="mamba", tie_embeddings=False)
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert count[1] - count[0] == 17 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step(dtype):
    model = build(mixer=PATTERN, depth=4, position="rotary", dropout=0.1, drop_path=0.1).to(dtype).train()
    ids = torch.randint(0, 17, (2, 12))
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_ssm_initial_values_and_weight_decay_survive():
    """A backbone that re-initialised its linear layers or decayed A would ruin the comparison unseen."""
    torch.manual_seed(0)
    model = create_model({**BASE, "dim": 64, "mixer": ["mamba", "mamba2", "delta"], "depth": 6})
    exempt = model.no_weight_decay()
    for i, block in enumerate(model.blocks):
        mixer, prefix = block.mixer, f"blocks.{i}.mixer."
        if mixer.name == "mamba":
            a = mixer.A_log.exp()
            assert torch.allclose(a, torch.arange(1.0, 17.0).expand_as(a))
            assert float(mixer.dt_proj.weight.detach().abs().max()) > 0.2  # not normal(0, 0.02)
        else:
            a = mixer.A_log.detach().exp()
            assert float(a.min()) >= 1
            assert float(a.max()) <= 16
        dt = F.softplus(mixer.dt_bias.detach())
        assert float(dt.min()) >= 0.00099
        assert float(dt.max()) <= 0.1001
        names = {"mamba": ["A_log", "D", "dt_bias"], "mamba2": ["A_log", "D", "dt_bias"]}
        for name in names.get(mixer.name, ["A_log", "dt_bias"]):
            assert prefix + name in exempt
        assert f"{prefix}in_proj.weight" not in exempt
        if mixer.name != "delta":
            assert bool((mixer.D == 1).all())
    assert abs(float(model.embedding.weight.detach().std()) - 0.02) < 0.002
    assert {"blocks.0.norm1.weight", "norm.weight"} <= exempt
    assert "embedding.weight" not in exempt


def test_separators_come_from_the_ids():
    """After a separator the far past is seen through it, and without one it is not; bytes have a default."""
    mixer = {"name": "sepllm", "local_window": 2, "initial_tokens": 0, "block_size": 4}
    model = build(vocab_size=256, mixer=mixer, depth=1, channel_mixer=None)
    assert bytes(model.blocks[0].mixer.separator_token_ids) == b"\n!,.:;?"

    def seen(text: bytes) -> list[int]:
        """The places whose embedding the last output depends on."""
        embedded = []
        hook = model.embedding.register_forward_hook(lambda *args: embedded.append(args[2].requires_grad_()))
        logits = model(torch.tensor([list(text)]))
        hook.remove()
        (grad,) = torch.autograd.grad(logits[0, -1].square().sum(), embedded[0])
        return (grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()

    assert seen(b"ab,cd.efg") == [2, 5, 7, 8]
    assert seen(b"abXcdXefg") == [7, 8]


def test_initial_scale_is_an_option():
    """Null is fan_in ** -0.5 for embeddings, head and channel mixers; mixers keep theirs; the scale starts as told."""
    with torch.device("meta"):
        default = create_model({**BASE, "mixer": "attention"})
    assert not any("layer_scale" in name for name, _ in default.named_parameters())
    torch.manual_seed(0)
    options = {**BASE, "vocab_size": 400, "dim": 64, "mixer": "attention", "tie_embeddings": False}
    model = create_model({**options, "init_std": None, "layer_scale": 0.3})
    block = model.blocks[0]
    for weight, std in (
        (model.embedding.weight, 1 / 8), (model.head.weight, 1 / 8), (block.channel_mixer.fc1.weight, 1 / 8),
        (block.channel_mixer.fc2.weight, block.channel_mixer.fc2.in_features ** -0.5), (block.mixer.qkv.weight, 0.02),
    ):  # fmt: skip
        assert abs(float(weight.detach().std()) / std - 1) < 0.05
    ids = torch.randint(0, 400, (2, 9))
    x = model.embedding(ids)
    mixed = block.mixer(block.norm1(x))
    expected = x + 0.3 * mixed
    expected = expected + 0.3 * block.channel_mixer(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)
    assert {"blocks.0.layer_scale1", "blocks.1.layer_scale2"} <= model.no_weight_decay()
    with torch.no_grad():
        logits, state = model(ids), model.init_state(2)
        for t in range(9):
            out, state = model.step(ids[:, t], state)
    torch.testing.assert_close(out, logits[:, -1], rtol=1e-4, atol=1e-5)
    for wrong in (0.0, -1.0):
        with pytest.raises(ConfigError, match=r"model\.init_std: .* must be above 0"):
            create_model({**BASE, "mixer": "attention", "init_std": wrong})


@pytest.mark.parametrize("name", [n for n in list_models("*_tiny") if model_config(n)["backbone"] == "language"])
def test_tiny_models_run(name):
    model = create_model(name).eval()
    ids = torch.randint(0, 256, (1, 33))
    assert model(ids).shape[:2] == (1, 33)
    if model.config.objective == "causal_lm":
        assert generate(model, ids, max_new_tokens=3).shape == (1, 3)
        assert model.state_bytes(50) > 0


def test_state_size_is_constant_for_recurrent_models():
    model = create_model("mamba2_tiny")
    assert model.state_bytes() == model.state_bytes(100)
    bounded = build(mixer={"name": "attention", "window": 8})
    assert bounded.state_bytes() == bounded.state_bytes(100)
    assert build(mixer="attention").state_bytes(100) > build(mixer="attention").state_bytes(10)


# -- generation


def test_generate_stops_and_samples():
    model = build(mixer="mamba")
    prompt = [1, 2, 3]
    greedy = generate(model, prompt, max_new_tokens=12, temperature=0)[0].tolist()
    stop = greedy[4]
    stopped = generate(model, prompt, max_new_tokens=12, temperature=0, stop=stop)[0].tolist()
    assert stopped == greedy[: greedy.index(stop) + 1]
    a, b = (generate(model, prompt, generator=torch.Generator().manual_seed(s), max_new_tokens=12) for s in (1, 1))
    assert torch.equal(a, b)
    c = generate(model, prompt, generator=torch.Generator().manual_seed(2), max_new_tokens=12)
    assert not torch.equal(a, c)
    assert generate(model, prompt, top_k=1, max_new_tokens=12)[0].tolist() == greedy
    assert generate(model, prompt, top_p=1e-6, max_new_tokens=12)[0].tolist() == greedy


def test_rows_that_ended_repeat_their_stop_token():
    model = build(mixer="mamba")
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = generate(model, prompts, max_new_tokens=10, temperature=0)
    stop = int(free[0, 0])
    out = generate(model, prompts, max_new_tokens=10, temperature=0, stop=stop)
    assert (out[0] == stop).all()


def test_filters():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.5).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.95).isfinite().tolist() == [[True, True, True, True]]
    torch.manual_seed(0)
    drawn = torch.cat([sample(logits) for _ in range(2000)]).bincount(minlength=4) / 2000
    assert float((drawn - logits.exp()[0]).abs().max()) < 0.05
    sharp = torch.cat([sample(logits, temperature=0.2) for _ in range(300)])
    assert float((sharp == 0).float().mean()) > 0.9


# -- bad input


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(("call", "match"), [
    (lambda m: m(ids(1, 4) + 17), "token id 17 is out of range"),
    (lambda m: m(ids(1, 4) - 1), "token id -1 is out of range"),
    (lambda m: m(ids(1, 0)), "empty"),
    (lambda m: m(torch.rand(1, 4)), "integers"),
    (lambda m: m(ids(4)), "shape"),
    (lambda m: m([[1, 2], [3]]), "mixed lengths"),
    (lambda m: m(ids(2, 4), mask=torch.ones(2, 3, dtype=torch.bool)), "mask"),
    (lambda m: m(ids(2, 4), mask=torch.ones(2, 4)), "bool"),
    (lambda m: m(ids(1, 65)), "65 tokens are more than the 64 learned positions"),
    (lambda m: generate(m, []), "empty"),
    (lambda m: generate(m, ids(1, 0)), "empty"),
    (lambda m: generate(m, ids(2, 3), mask=torch.tensor([[True] * 3, [False] * 3])), "empty"),
    (lambda m: generate(m, [1, 99]), "token id 99 is out of range"),
    (lambda m: generate(m, [[1, 2], [3]]), "mixed lengths"),
    (lambda m: generate(m, ids(1, 60), max_new_tokens=10), "learned positions"),
    (lambda m: generate(m, [1], max_new_tokens=0), "max_new_tokens"),
    (lambda m: generate(m, [1], temperature=-1.0), "temperature"),
    (lambda m: generate(m, [1], top_k=0), "top_k"),
    (lambda m: generate(m, [1], top_p=1.5), "top_p"),
    (lambda m: pad_prompts([[1], []]), "empty"),
    (lambda m: pad_prompts([[1]], side="top"), "side"),
])  # fmt: skip
def test_bad_input(call, match):
    model = build(mixer="attention", position="learned", sequence_length=64)
    with pytest.raises(ConfigError, match=match):
        call(model)


@pytest.mark.parametrize(("changes", "match"), [
    ({"mixer": ["mamba2", "mambo"]}, r"model\.mixer\[1\].*mambo.*Did you mean \"mamba\""),
    ({"mixer": ["mamba2", "fnet"]}, r"model\.mixer\[1\].*cannot be causal"),
    ({"mixer": []}, "empty"),
    ({"mixer": {"name": "mamba", "d_stat": 3}}, r"model\.mixer\.d_stat.*d_state"),
    ({"mixer": "mamba", "position": "learned"}, "sequence_length"),
    ({"mixer": "mamba", "position": "rotery"}, "rotary"),
    ({"mixer": "mamba", "objective": "classify"}, "num_classes"),
    ({"mixer": "mamba", "objective": "masked_lm"}, "causal=false"),
    ({"mixer": "attention", "causal": False}, "causal_lm needs"),
    ({"mixer": "mamba", "vocab_size": 0}, "vocab_size"),
    ({"mixer": "mamba", "dropout": 1.0}, "dropout"),
    ({"mixer": "mamba", "norm_placement": "middle"}, "norm_placement"),
    ({"mixer": "mamba", "vocabulary": 3}, "vocab_size"),
])  # fmt: skip
def test_bad_configuration(changes, match):
    with pytest.raises(ConfigError, match=match):
        create_model({**BASE, **changes})


def test_positions_reach_the_mixers_that_take_them():
    """Also where the command line has given the option's default, null; a mixer's own choice stands, "none" too."""
    given = [
        {"name": "attention", "position": None},
        {"name": "attention", "position": "none"},
        {"name": "attention", "position": "alibi"},
        "mamba",
    ]
    model = build(mixer=given, depth=4, position="rotary")
    assert [b.mixer.position for b in model.blocks[:3]] == ["rotary", "none", "alibi"]
    with pytest.warns(UserWarning, match="none of the mixers"):
        build(mixer="mamba", position="rotary")


def test_lightning_decays_by_layer():
    model = build(mixer={"name": "linear_attention", "decay": "lightning"}, depth=4)
    assert [b.mixer.lightning_rate for b in model.blocks] == [8.0, 6.0, 4.0, 2.0]
    model = build(mixer={"name": "linear_attention", "decay": "lightning", "lightning_rate": 8.0}, depth=2)
    assert [b.mixer.lightning_rate for b in model.blocks] == [8.0, 8.0]  # an explicit value is everybody's


def test_encoders_do_not_generate():
    model = build(mixer="attention", causal=False, objective="masked_lm")
    with pytest.raises(ConfigError, match="causal_lm"):
        generate(model, [1, 2])
    with pytest.raises(ConfigError, match="encoder"):
        model.init_state(1)


def test_documents_need_mixers_that_keep_them_apart():
    model = build(mixer="fnet", causal=False, objective="features")
    with pytest.raises(ConfigError, match="cross"):
        model(ids(1, 4), document_ids=ids(1, 4))


@pytest.mark.parametrize("name", list_mixers(causal=True, axes=1))
def test_every_causal_mixer_in_the_backbone(name):
    """Trains; decodes as it computes in parallel where it streams; padded prompts too where it takes masks."""
    mixer = {"name": name, **({"l_max": 24} if "l_max" in mixer_options(name) else {})}
    model = build(mixer=mixer, sequence_length=24)
    tokens = torch.randint(0, 17, (2, 24))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    if not mixer_class(name).streams:
        with pytest.raises(ConfigError, match="does not stream"):
            generate(model, [1, 2])
        return
    with torch.no_grad():
        logits = model(tokens)
        state = model.init_state(2)
        for t in range(24):
            out, state = model.step(tokens[:, t], state)
            torch.testing.assert_close(out, logits[:, t], rtol=1e-4, atol=1e-4)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    alone = [generate(model, p, max_new_tokens=5, temperature=0)[0] for p in prompts]
    for side in ("left", "right"):
        batch, mask = pad_prompts(prompts, side=side, padding_id=16)
        together = generate(model, batch, mask=mask, max_new_tokens=5, temperature=0)
        assert torch.equal(together, torch.stack(alone)), side

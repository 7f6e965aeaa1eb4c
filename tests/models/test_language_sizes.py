"""Sizes of the language models: published parameter counts."""

from __future__ import annotations

import pytest
from mixerzoo.models.create import on_meta

# The published counts: state-spaces' released checkpoints, and what transformers builds from google/fnet-base without
# its pooler. PoNet's paper says 124M.
PUBLISHED = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1.4b": 1_372_178_432,
    "mamba_2.8b": 2_768_345_600,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1.3b": 1_343_757_312,
    "mamba2_2.7b": 2_702_599_680,
    "fnet_base": 82_894_592,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert sum(p.numel() for p in on_meta(name).parameters()) == PUBLISHED[name]


def fla_layers(mixer: str, dim: int, heads: int, key: float, value: float, hidden_ratio: int) -> dict[str, int]:
    """Parameters of a block of flash-linear-attention's models, layer by layer, from the fields of its config classes.

    key, value: `expand_k`, `expand_v`. The MLP has `intermediate_size` none: 2/3 of the ratio, up to a multiple of 256.
    """
    k, v = int(dim * key), int(dim * value)
    hidden = -(-int(dim * hidden_ratio * 2 / 3) // 256) * 256
    layers = {"q": dim * k, "k": dim * k, "v": dim * v, "o": v * dim, "o_norm": v // heads}
    layers |= {"attn_norm": dim, "mlp_norm": dim, "gate": dim * hidden, "up": dim * hidden, "down": hidden * dim}
    if mixer in ("gla", "retnet"):  # use_output_gate
        layers["g"] = dim * v
    if mixer == "gla":  # the decays, of rank 16
        layers |= {"gk_0": dim * 16, "gk_1": 16 * k + k}
    if mixer == "delta_net":  # use_beta, use_short_conv with conv_size 4
        layers |= {"b": dim * heads, "conv": 4 * (k + k + v)}
    return layers


# gla and deltanet: the authors' training configurations gla_340M (tied) and delta_net_340M; of retnet there is none of
# this size, so the defaults of RetNetConfig with hidden_size=1024 and num_heads=4
@pytest.mark.parametrize(("name", "layers", "tied"), [
    ("gla_340m", fla_layers("gla", 1024, 4, 0.5, 1.0, 4), True),
    ("retnet_340m", fla_layers("retnet", 1024, 4, 1.0, 2.0, 2), False),
    ("deltanet_340m", fla_layers("delta_net", 1024, 8, 1.0, 1.0, 4), False),
])  # fmt: skip
def test_counts_of_flash_linear_attention(name, layers, tied):
    model = on_meta(name)
    embeddings = 32000 * 1024
    expected = 24 * sum(layers.values()) + 1024 + embeddings * (1 if tied else 2)
    assert sum(p.numel() for p in model.parameters()) == expected
    # the same layers, not only the same sum
    block = model.blocks[0]
    assert block.norm1.weight.numel() + block.norm2.weight.numel() == layers["attn_norm"] + layers["mlp_norm"]
    assert block.mixer.norm.weight.numel() == layers["o_norm"]
    assert block.mixer.out_proj.weight.numel() == layers["o"]
    assert sum(p.numel() for p in block.channel_mixer.parameters()) == sum(layers[n] for n in ("gate", "up", "down"))


@pytest.mark.parametrize(("name", "low", "high"), [
    ("ponet_base", 123e6, 125e6),
    ("transformer_130m", 118e6, 135e6),
    ("transformer_2.7b", 2.6e9, 2.8e9),
    ("hybrid_130m", 125e6, 135e6),
    ("hybrid_2.7b", 2.65e9, 2.75e9),
])  # fmt: skip
def test_size_classes(name, low, high):
    assert low < sum(p.numel() for p in on_meta(name).parameters()) < high

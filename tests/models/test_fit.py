"""Norms and channel mixers that would show the future or padding are refused, with the path of their key."""

from __future__ import annotations

import pytest
import torch
from mixerzoo import ConfigError, create_model

SMALL = {"dim": 16, "depth": 1, "vocab_size": 20}


@pytest.mark.parametrize(
    ("overrides", "path", "why"),
    [
        ({"norm": "group_norm"}, "model.norm", "those after it"),
        ({"norm": {"name": "group_norm", "eps": 1e-3}}, "model.norm", "layer_norm"),
        ({"norm": "batch_norm"}, "model.norm", "statistics over batch"),
        ({"channel_mixer": "conv_mlp"}, "model.channel_mixer", "2 grid axes"),
        ({"channel_mixer": "inverted_residual"}, "model.channel_mixer", "2 grid axes"),
        ({"channel_mixer": "channel_attention_conv"}, "model.channel_mixer", "2 or 3 grid axes"),
    ],
)
def test_refused_in_a_causal_language_model(overrides: dict, path: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^{path}: .*{why}"):
        create_model("transformer_tiny", **SMALL, **overrides)


def test_a_grid_that_a_channel_mixer_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"^model.channel_mixer: .*takes 2 grid axes"):
        create_model("vim_small", num_classes=3, image_size=32, depth=1, channel_mixer="conv_mlp")


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "affine", "none", "std_layer_norm"])
def test_norms_of_tokens_alone_show_nothing(norm: str) -> None:
    """By values: neither the future nor padding reaches a real token of a causal model in training mode."""
    model = create_model("transformer_tiny", **SMALL, norm=norm).train()
    ids = torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 20], 1)
    torch.testing.assert_close(model(ids)[:, :5], model(changed)[:, :5])


def test_an_encoder_refuses_padding_where_a_part_would_mix_it() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    encoder = {"causal": False, "objective": "masked_lm", **SMALL}
    grouped = create_model("transformer_tiny", **encoder, norm="group_norm")
    grouped(ids)
    with pytest.raises(ConfigError, match=r"^mask: GroupNorm mixes tokens"):
        grouped(ids, mask=mask)
    with pytest.raises(ConfigError, match=r"^document_ids: GroupNorm mixes tokens"):
        grouped(ids, document_ids=ids)
    batched = create_model("transformer_tiny", **encoder, norm="batch_norm")
    batched.eval()(ids, mask=mask)
    with pytest.raises(ConfigError, match=r"^mask: BatchNorm takes statistics"):
        batched.train()(ids, mask=mask)


DROPS = {"name": "token_pruning", "token_keep_rate": 0.5}
THEN_PLAIN = [DROPS, "metaformer"]
THEN_FNET = [{"name": "sparsifiner", "class_token": True}, "fnet"]
SPARSE = {"dim": 16, "depth": 2, "patch_size": 4, "image_size": [16, 24], "num_classes": 3}


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("vim_small", {"head": "conv"}, r"^model\.head: .*takes 2 grid axes, not sequences"),
        ("vim_small", {"head": "upsample"}, r"^model\.head: .*takes 2 or 3 grid axes"),
        ("metaformer_digits", {"head": {"name": "linear", "pool": "token"}}, r"^model\.head\.pool: .*class token"),
        ("mixer_s16", {"head": {"name": "linear", "pool": "token"}}, r"^model\.head\.pool: .*class token"),
        ("sparsifiner_deit_small", {"block": DROPS, "head.pool": "avg"}, r"^model\.head\.pool: \"avg\" reads tokens"),
        ("sparsifiner_deit_small", {"block": THEN_PLAIN, "norm": "group_norm"}, r"^model\.block\[1\]: .*mask"),
        ("sparsifiner_deit_small", {"block": THEN_PLAIN, "mixer": THEN_FNET}, r'^model\.block\[1\]: "fnet" follows'),
        ("transformer_tiny", {"objective": "causal_ml"}, r'^model\.objective: "causal_ml".*Did you mean "causal_lm"'),
        ("transformer_tiny", {"objective": "classify"}, r"^model\.num_classes: classify needs"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_its_place_is_refused(model: str, changes: dict, said: str) -> None:
    small = SMALL if model == "transformer_tiny" else SPARSE if "head.pool" in changes or "block" in changes else {}
    with pytest.raises(ConfigError, match=said):
        create_model(model, **small, **changes)


def test_what_is_dropped_is_not_read_by_later_blocks() -> None:
    """The mask travels to blocks that drop nothing; without it they would read rows of zeros."""
    torch.manual_seed(0)
    model = create_model("sparsifiner_deit_small", block=THEN_PLAIN, **SPARSE).eval()
    seen = []
    model.stages[1].blocks[0].mixer.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["mask"]), with_kwargs=True
    )
    model.set_grad_checkpointing()
    y = model(torch.randn(2, 3, 16, 24))
    assert seen[0].sum(1).tolist() == [13, 13]
    assert seen[0].shape == (2, 25)
    y.sum().backward()

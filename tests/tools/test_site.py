"""What the pages of the site are made of: standings, costs, pictures, equations, links."""

from __future__ import annotations

import importlib

import pytest
import torch
from mixerzoo.mixers import create_mixer, list_mixers
from mixerzoo.mixers.registry import mixer_class
from mixerzoo.models import create_model
from mixerzoo.tools.site import api, growth, links, mixing, model_mixing, ops, parts, standings

# -- standings


def test_mixers_of_a_command():
    assert standings.mixers_of("python train.py model=a mixer=mamba2 mixer.d_state=8 seed=0") == ("mamba2",)
    assert standings.mixers_of("python train.py 'mixer=[mamba2,mamba2,attention]' seed=0") == ("mamba2", "attention")
    assert standings.mixers_of("python train.py mixer=gla") == ("linear_attention",)  # by its file in configs/mixer
    assert standings.mixers_of("python train.py channel_mixer=mlp model=b") == ()


def test_standings_of_the_stored_comparisons():
    (strip,) = [one for one in standings.of_mixer("strip") if one.study == "vision"]
    assert (strip.rank, strip.arms, strip.reference) == (1, 21, False)
    assert strip.score == "top1 0.8730 ± 0.0026"
    attention = {one.study + one.point: one for one in standings.of_mixer("attention") if one.arm == "attention"}
    assert attention["vision"].rank == 19
    assert attention["vision"].reference
    assert attention["recalltask.num_kv_pairs=4"].rank == 1
    assert attention["length"].rank is None
    assert attention["length"].cost.startswith("a training step grows as N^1.81, what it keeps as N^1.00")
    assert {one.model for one in standings.of_models(("metaformer_fashion",))} == {"metaformer_fashion"}
    assert all(set(one.mixers) <= set(list_mixers()) and one.mixers for one in standings.all_standings())


# -- costs


def test_costs_over_the_number_of_tokens(monkeypatch):
    monkeypatch.setattr(growth, "SIDES", (4, 8))
    identity, attention, mamba, raft = map(growth.costs, ("identity", "attention", "mamba", "raft"))
    assert [(c.flops, c.kept, c.parameters, c.state) for c in identity] == [(0, 0, 0, 0), (0, 0, 0, 0)]
    assert [c.tokens for c in attention] == [16, 64]
    keys_and_values = [2 * n * 64 * 4 for n in (16, 64)]
    assert [c.state - kv for c, kv in zip(attention, keys_and_values, strict=True)] == [
        16 * 8 + 8,
        64 * 8 + 8,
    ]  # places
    projections = [2 * n * 64 * 4 * 64 for n in (16, 64)]
    assert attention[1].flops - projections[1] >= 16 * (attention[0].flops - projections[0]) * 0.9  # N^2
    assert mamba[0].state == mamba[1].state
    assert raft[0].grid == (4, 4)
    assert raft[0].parameters < raft[1].parameters
    assert all(c.state is None for c in raft)


# -- pictures


def test_strengths_are_where_a_mixer_looks():
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[2:5, 2:5] = True
    assert torch.equal(mixing.on_grid(create_mixer("pooling", mixing.DIM), (7, 7)) > 0, near)
    itself = mixing.on_grid(create_mixer("identity", mixing.DIM), (7, 7)) > 0
    assert itself[3, 3]
    assert itself.sum() == 1


def test_the_matrix_of_a_sequence_has_outputs_as_rows():
    torch.manual_seed(0)
    mixer = create_mixer("conv", 8, causal=True, kernel_size=3)
    seen = mixing.matrix(mixer, torch.randn(1, 6, 8)) > 0
    place = torch.arange(6)
    age = place[:, None] - place
    assert torch.equal(seen, (age >= 0) & (age < 3))


def test_training_on_digits_changes_what_is_mixed():
    before, after, accuracy = mixing.trained_on_digits("conv", steps=30)
    assert before.shape == after.shape == mixing.PLANE
    assert accuracy > 0.5
    assert not torch.allclose(before / before.max(), after / after.max(), rtol=0.05)


@pytest.mark.parametrize("name", ["pooling", "mix_shift", "mate"])
def test_pictures_of_sequences_images_and_clips(name):
    picture, caption = mixing.picture_of_mixer(name, train=False)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert ("sequence" in caption) == (1 in mixer_class(name).axes)


def test_what_a_whole_model_sees():
    torch.manual_seed(0)
    model = create_model("metaformer_digits", mixer="identity").eval()
    seen = model_mixing._of_images(model, torch.randn(1, 1, 8, 8)) > 0
    field = torch.zeros(8, 8, dtype=torch.bool)
    field[2:7, 2:7] = True  # of the token (2, 2) of 4x4, through two convolutions of side 3, the second of stride 2
    assert torch.equal(seen, field)

    language = create_model("mamba2_tiny", depth=1, mixer={"name": "conv", "kernel_size": 3}).eval()
    age = torch.arange(mixing.TOKENS)[:, None] - torch.arange(mixing.TOKENS)
    assert torch.equal(model_mixing._of_sequence(language, 256) > 0, (age >= 0) & (age < 3))


def test_the_picture_of_a_channel_mixer():
    part = torch.nn.Linear(4, 4, bias=False)
    assert torch.allclose(mixing.of_channels(part, (3, 3), dim=4), part.weight.abs())
    page, picture = parts.channel_mixer_page("mlp")
    assert picture[:4] == b"\x89PNG"
    assert "| FLOPs of a token | 65," in page  # two products of 64 x 256, and the activation
    assert "| Mixes tokens, too | no |" in page
    assert "Right:" in parts.channel_mixer_page("channel_attention_conv")[0]


# -- pages


def test_the_page_of_a_mixer(monkeypatch):
    monkeypatch.setattr(growth, "SIDES", (4,))
    page, _ = parts.mixer_page("delta", quick=True)
    for line in (
        "# delta",
        "| Year | 2024 |",
        mixer_class("delta").equation,
        'mixer = create_mixer("delta", 64)',
        "| `gated` | bool | `True` | whether the state decays (Gated DeltaNet) or not (DeltaNet). |",
        "[`deltanet`](../models/deltanet.md)",
        "| Decodes token by token | yes |",
    ):
        assert line in page
    assert "Args:" not in page


def test_every_example_of_a_mixer_runs():
    for name in list_mixers():
        code = parts._usage(name, mixer_class(name)).removeprefix("```python\n").removesuffix("```")
        exec(compile(code, name, "exec"), {})


def test_notes_leave_out_lists_and_fence_formulas():
    class Example:
        """First.

            y = W x

        See arXiv:1706.03762.

        Args:
            dim: channels.

        Shapes: `x` and
        more.
        """

    link = "[arXiv:1706.03762](https://arxiv.org/abs/1706.03762)"
    assert parts.notes(Example) == f"```text\ny = W x\n```\n\nSee {link}."


@pytest.mark.parametrize("name", ops.op_names())
def test_the_page_of_an_op(name):
    page = ops.op_page(name)
    assert "https://arxiv.org/abs/" in page
    assert f"::: mixerzoo.kernels.{name}." in page
    assert ops.equation(ops.op_modules()[name], name) in page


def test_tables_of_an_op_are_its_own():
    page = ops.op_page("gla")
    assert "| gla.forward |" in page
    assert "| gla with backward |" in page
    assert "| ssd" not in page


def test_names_of_the_reference_exist():
    for module in (module for _, modules in api.MODULES.values() for module in modules):
        names = api.public_names(module)
        assert names
        for name in names:
            home, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(home), last), name
    assert "mixerzoo.mixers.registry.create_mixer" in api.public_names("mixerzoo")


def test_links_of_the_repository_become_links_of_the_site():
    text = "[a](docs/mixers.md#mamba) [b](docs/speed.md) [c](CONTRIBUTING.md#x) [d](docs/results/vision/report.md)"
    adapted = "[a](mixers/mamba.md) [b](speed.md) [c](contributing.md#x) [d](results/vision/report.html)"
    assert links.from_root(text) == adapted
    assert links.adapted("[e](../CONTRIBUTING.md) [f](orders.md)") == "[e](contributing.md) [f](orders.md)"

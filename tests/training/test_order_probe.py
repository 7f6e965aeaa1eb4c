"""The probe of token orders: the system it is, and what it finds where the answer is planted."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task
from mixerzoo.training.order_probe import Features, LTIProbe, probe, table, tokens_of, trained_features

GRID = (3, 4)


def test_the_state_is_that_of_the_recurrence():
    torch.manual_seed(0)
    head = LTIProbe(8, 3, GRID, order="cross_scan", states=5, memory=6.0).double()
    u = torch.randn(2, 4, 12, 5, dtype=torch.float64)
    h = torch.zeros(2, 4, 5, dtype=torch.float64)
    for t in range(12):
        h = head.decay * h + (1 - head.decay) * u[:, :, t]
    torch.testing.assert_close(head.state(u), h)
    constants = -1 / head.decay.log()
    torch.testing.assert_close(constants[[0, -1]], torch.tensor([1.0, 6.0], dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def planted():
    """Noise everywhere, and the class in the first token alone."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for split, count in (("train", 600), ("test", 200)):
        target = torch.randint(3, (count,), generator=generator)
        tokens = torch.randn(count, *GRID, 8, generator=generator)
        tokens[torch.arange(count), 0, 0, target] += 6.0
        found[split] = Features(tokens, target)
    return found


def test_it_finds_what_is_read_last(planted):
    found = {order: probe(planted, order=order, epochs=6, memory=1.5)[0] for order in ("raster", "raster_reversed")}
    assert found["raster"] < 0.5  # a third is chance: eleven tokens later the first one is forgotten
    assert found["raster_reversed"] > 0.95
    learned, head = probe(planted, order={"name": "sinkhorn", "temperature": 20.0}, epochs=30, memory=1.5)
    assert learned > found["raster"] + 0.2
    scores = head.order.scores(planted["test"].tokens, None)[0]
    assert scores[0] > 2  # the token that knows has moved back from the first place
    assert found["raster"] < probe(planted, order=None, epochs=6)[0]


def test_the_model_is_frozen_and_trained():
    task = create_task("digits")
    task.open()
    model = {"backbone": "isotropic", "dim": 16, "depth": 1, "patch_size": 2, "position": "learned", "init_std": None}
    score, features = trained_features(task, "pooling", epochs=6, seed=0, model=model)
    assert score > 0.4
    assert features["train"].tokens.shape == (1257, 4, 4, 16)
    assert not features["train"].tokens.requires_grad
    assert features["test"].target.shape == (360,)
    again = trained_features(task, "pooling", epochs=6, seed=0, model=model)
    assert torch.equal(again[1]["test"].tokens, features["test"].tokens)


def test_tokens_are_the_last_map():
    from mixerzoo import create_model

    network = create_model("metaformer_digits").eval()
    images = torch.randn(300, 1, 8, 8)
    torch.testing.assert_close(tokens_of(network, images), network.forward_features(images).permute(0, 2, 3, 1))


def test_table_averages_over_seeds():
    rows = [{"mixer": "m", "seed": s, "model": 0.5 + 0.1 * s, "gap": 0.25} for s in (0, 1)]
    assert table(rows).splitlines()[-1] == "| `m` | 55.0 | 25.0 |"


def test_mistakes(planted):
    with pytest.raises(ConfigError, match="memory"):
        LTIProbe(8, 3, GRID, order="raster", memory=0.5)
    with pytest.raises(ConfigError, match="raster"):
        LTIProbe(8, 3, GRID, order="rasterr")
    with pytest.raises(ConfigError, match="windows"):
        probe(planted, order={"name": "atrous", "size": 2}, epochs=1)

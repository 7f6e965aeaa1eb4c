"""The learned order: doubly stochastic, a permutation in the limit, trained by gradient, and its part in a mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo import create_model
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.orders.ordered import Ordered
from mixerzoo.mixers.orders.sinkhorn import SinkhornOrder
from mixerzoo.mixers.registry import check_mixer
from mixerzoo.models.resize import resize_grid

GRID, DIM = (3, 5), 8
COUNT = 15


def order(*, shuffled: bool = True, **options: Any) -> SinkhornOrder:
    made = SinkhornOrder(DIM, GRID, **options)
    if shuffled:
        generator = torch.Generator().manual_seed(0)
        wanted = torch.randperm(COUNT, generator=generator)  # the place of every token
        made.shift.data = ((wanted - torch.arange(COUNT)) / COUNT).view(GRID)
        if made.content is not None:
            torch.nn.init.normal_(made.content.weight, std=0.1, generator=generator)
    return made


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, *GRID, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_doubly_stochastic(temperature, content):
    made = order(temperature=temperature, content=content, iterations=200)
    matrix = made.read(tokens()).matrix
    assert matrix.shape == (2 if content else 1, COUNT, COUNT)
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix), COUNT))
    torch.testing.assert_close(matrix.sum(-2), torch.ones(len(matrix), COUNT), rtol=0, atol=2e-2)
    few = order(temperature=temperature, content=content, iterations=1).read(tokens()).matrix
    assert content is False or (few.sum(-2) - 1).abs().max() > 5e-2  # whole places need hardly any iteration


def test_cold_and_hard_are_the_permutation():
    x = tokens()
    cold, hard = order(temperature=0.01), order(hard=True).eval()
    y = hard.read(x).scan(x)
    torch.testing.assert_close(cold.read(x).scan(x), y)
    wanted = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(y[:, 0, wanted], x.flatten(1, 2))  # token j stands at place wanted[j]
    assert torch.equal(hard.read(x).merge(y, GRID), x)
    assert torch.equal(hard.read(x).unscan(y, GRID), x.unsqueeze(1))
    assert hard.train().read(x).matrix is not None


def test_gradients_reach_the_scores():
    made = order(content=True, temperature=2.0).double()
    x = tokens().double().requires_grad_()

    def both(x, shift, weight):
        made.shift, made.content.weight = None, None
        made.__dict__["shift"], made.content.__dict__["weight"] = shift, weight
        reading = made.read(x)
        return reading.merge(reading.scan(x) ** 2, GRID)

    shift = made.shift.detach().clone().requires_grad_()
    weight = made.content.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(both, (x, shift, weight), fast_mode=True)


def test_an_order_is_learned():
    """Tokens that are to be read in another order end there, exactly, when the order is made hard."""
    torch.manual_seed(0)
    made = SinkhornOrder(4, (6,), temperature=4.0, hard=True)
    wanted = torch.tensor([1, 0, 2, 5, 4, 3])
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(200):
        x = torch.randn(16, 6, 4)
        loss = (made.read(x).scan(x)[:, 0] - x[:, wanted]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(made.eval().read(x).index[0], wanted)


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"content": True}], ids=str)
@pytest.mark.parametrize("name", ["mamba", "attention"])
def test_in_a_mixer(name, options):
    torch.manual_seed(0)
    mixer = create_mixer(name, DIM, grid=GRID, order={"name": "sinkhorn", **options})
    assert isinstance(mixer, Ordered)
    torch.nn.init.normal_(mixer.order.shift, std=0.2)
    x = tokens()
    y = mixer(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in mixer.parameters())
    assert mixer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    mixer = mixer.float().eval()
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[1, :, 3:] = False
    mask[0, 0, 0] = False
    other = torch.where(mask.unsqueeze(-1), x, 17 * tokens(9))
    torch.testing.assert_close(mixer(x, mask=mask)[mask], mixer(other, mask=mask)[mask], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixer(x)[mask], mixer(other)[mask], atol=1e-3)
    assert {"order.shift"} <= mixer.no_weight_decay() <= {n for n, _ in mixer.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_mask_leaves_a_permutation_of_the_real_tokens():
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[0, :, 1] = False
    for made in (order(iterations=100), order(hard=True).eval()):
        reading = made.read(tokens(), mask)
        real = reading.scan_mask(mask)
        assert real.sum(-1).flatten().tolist() == [12, 15]
        marked = reading.scan(mask.float().unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(marked, real.float(), rtol=0, atol=1e-4)
        back = reading.merge(real.float().unsqueeze(-1), GRID).squeeze(-1)
        torch.testing.assert_close(back, mask.float(), rtol=0, atol=1e-2)


def test_another_grid():
    config = {
        "backbone": "isotropic", "dim": 8, "depth": 1, "patch_size": 4, "image_size": 16, "num_classes": 3,
        "mixer": {"name": "mamba", "order": {"name": "sinkhorn", "temperature": 0.01}},
    }  # fmt: skip
    model = create_model(config)
    with pytest.raises(ConfigError, match="resize_grid"):
        model(torch.randn(1, 3, 16, 24))
    mixer = next(m for m in model.modules() if isinstance(m, Ordered))
    torch.nn.init.constant_(mixer.order.shift, 0.25)
    resize_grid(model, (16, 24))
    assert mixer.order.shift.shape == (4, 6)
    torch.testing.assert_close(mixer.order.shift.data, torch.full((4, 6), 0.25))
    x = torch.randn(1, 3, 16, 24)
    raster = create_model({**config, "image_size": [16, 24], "mixer": {"name": "mamba", "order": "raster"}})
    raster.load_state_dict({k: v for k, v in model.state_dict().items() if "order." not in k})
    torch.nn.init.zeros_(mixer.order.shift)
    torch.testing.assert_close(model(x), raster(x), rtol=1e-3, atol=1e-4)
    video = SinkhornOrder(8, (2, 3, 3))
    video.resize_grid((2, 4, 4))
    assert video.read(torch.randn(1, 2, 4, 4, 8)).matrix.shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "sinkhorn", "temp": 1.0},
            r'm.order.temp: learned order "sinkhorn" has no such option.*"temperature"',
        ),
        (["raster", "sinkhorn"], r'm.order\[1\]: the learned order "sinkhorn" stands alone'),
        ({"name": "sinkhorn", "temperature": 0.0}, r"m\.order\.temperature: 0\.0 must be at least 0\.001"),
    ],
)
def test_mistakes(spec, message):
    with pytest.raises(ConfigError, match=message):
        create_mixer("mamba", 8, grid=GRID, order=spec, key="m")


def test_it_needs_the_grid_and_has_one_path():
    with pytest.raises(ConfigError, match=r"order: sinkhorn .* pass grid"):
        create_mixer("mamba", 8, order="sinkhorn")
    with pytest.raises(ConfigError, match="needs several paths"):
        create_mixer("mamba", 8, grid=GRID, order="sinkhorn", merge="gated")
    with pytest.raises(ConfigError, match="reads its tokens from first to last"):
        create_mixer("mamba", 8, grid=GRID, order="sinkhorn", causal=True)
    check_mixer({"name": "mamba", "order": "sinkhorn"}, key="m")

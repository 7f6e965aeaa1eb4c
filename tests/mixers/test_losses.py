"""Auxiliary losses: named, summed over layers, without effect where nobody collects, through compilation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import aux_loss, collect_losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        aux_loss(self.name, self.weight**2)
        return self.weight * x


def test_losses_of_a_name_are_summed_and_keep_their_gradients() -> None:
    layers = nn.Sequential(Layer("a"), Layer("b"), Layer("a"))
    layers(torch.ones(3))  # nobody collects
    with collect_losses() as losses:
        layers(torch.ones(3))
    assert {name: float(value) for name, value in losses.items()} == {"a": 8.0, "b": 4.0}
    (losses["a"] + 10 * losses["b"]).backward()
    assert [float(p.grad) for p in layers.parameters()] == [4.0, 40.0, 4.0]


def test_the_inner_block_collects_and_an_error_closes_it() -> None:
    with collect_losses() as outer:
        with contextlib.suppress(RuntimeError), collect_losses() as inner:
            aux_loss("a", torch.tensor(1.0))
            raise RuntimeError
        aux_loss("b", torch.tensor(2.0))
    assert (list(inner), list(outer)) == (["a"], ["b"])


def test_recomputation_does_not_count_twice() -> None:
    layer, x = Layer("a"), torch.ones(3, requires_grad=True)
    with collect_losses() as losses:
        y = checkpoint(layer, x, use_reentrant=False)
    (y.sum() + losses["a"]).backward()
    assert len(losses.values_of["a"]) == 1
    assert float(layer.weight.grad) == 3 + 4


def test_compiled_whole() -> None:
    layer = Layer("a")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(3))
    for _ in range(2):
        layer.weight.grad = None
        with collect_losses() as losses:
            compiled(torch.ones(3))
        losses["a"].backward()
        assert float(losses["a"].detach()) == float(layer.weight.grad) == 4.0


def test_a_loss_is_a_scalar() -> None:
    with pytest.raises(ConfigError, match=r'aux_loss\("a"\).*\(3,\)'):
        aux_loss("a", torch.ones(3))

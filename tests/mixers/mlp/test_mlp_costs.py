"""FLOPs and activation memory of the MLP family grow with the number of tokens as the class data says."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.mixers import create_mixer, mixer_class
from mixerzoo.training.cost import measure_activation_bytes, measure_flops

MIXERS = ["dense", "resmlp", "gmlp", "mlp_mixer", "ninformer", "raft", "strip", "mix_shift", "shift"]
GROWTH = {"N": 4.0, "N sqrt(N)": 8.0, "N^2": 16.0}  # for four times the tokens


@pytest.mark.parametrize("name", MIXERS)
def test_costs_grow_as_stated(name: str) -> None:
    flops, memory = [], []
    small = 64 if name == "strip" else 16  # beside its strips it has much that is linear in N
    for side in (small, 2 * small):
        torch.manual_seed(0)
        mixer = create_mixer(name, 16, grid=(side, side))
        x = torch.randn(1, side, side, 16, requires_grad=True)
        flops.append(measure_flops(mixer, x, elementwise=False))
        memory.append(measure_activation_bytes(mixer, x))
    cls = mixer_class(name)
    if name == "shift":
        assert flops == [0, 0]  # it only moves
    else:
        assert flops[1] / flops[0] == pytest.approx(GROWTH[cls.complexity], rel=0.2)
    assert memory[1] <= memory[0] * GROWTH[cls.memory] * 1.05

"""In float64 no mixer rounds to float32 on the way, so that a model in float64 can judge the same one in float32."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import DIM, all_grids, build
from mixerzoo.contract.tools import tokens
from mixerzoo.mixers import list_mixers


@pytest.mark.parametrize("name", list_mixers())
def test_differences_agree_with_the_gradient(name):
    """A difference quotient over 1e-5 shows rounding to float32, which is 6e-8 of what it subtracts."""
    for grids in all_grids(name):
        grid = grids[-1]
        mixer = build(name, grid).double()
        x, along, weight = (tokens(1, *grid, DIM, seed=seed).double() for seed in (1, 2, 3))
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((mixer(x) * weight).sum(), x)
        with torch.no_grad():
            there, back = (float((mixer(x + 1e-5 * sign * along) * weight).sum()) for sign in (1, -1))
        slope = float((gradient * along).sum())
        assert abs((there - back) / 2e-5 - slope) <= 1e-6 * (1 + abs(slope)), grid

"""What our models and norms do differently under `torch.compile`, and that it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo import create_model
from mixerzoo.models.parts.norms import GroupNorm
from torch import nn
from torch.testing import assert_close


@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (3, 11, 12), (1, 2, 3, 5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_compiled_is_group_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(12, eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x, cotangent = (3 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)
    found = []
    for call in (norm, compiled):
        given = x.clone().requires_grad_()
        y = call(given)
        found.append((y, *torch.autograd.grad(y, [given, norm.weight, norm.bias], cotangent)))
    for ours, expected in zip(found[1], found[0], strict=True):
        assert ours.dtype == expected.dtype
        tight = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
        assert_close(ours, expected, **tight)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"options": {"layout_optimization": False}}),
        ({"fullgraph": True}, {"fullgraph": True, "options": {"layout_optimization": False}}),
        ({"options": {"max_autotune": True}}, {"options": {"max_autotune": True}}),
        ({"mode": "reduce-overhead"}, {"mode": "reduce-overhead"}),
        ({"backend": "aot_eager"}, {"backend": "aot_eager"}),
    ],
)
def test_models_compile_without_the_layout_pass(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: taken.append(kwargs))
    create_model("poolformer_s12", dims=[8, 8, 8, 8], depths=[1, 1, 1, 1]).compile(**given)
    assert taken == [expected]

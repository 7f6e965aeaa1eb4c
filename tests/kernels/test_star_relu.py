"""star_relu equals its formula: outputs, gradients and their gradients, on whichever path."""

from __future__ import annotations

import functools

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import star_relu
from mixerzoo.kernels.star_relu import eager
from mixerzoo.tests.kernels.utils import TOLERANCE, error, run, skewed, widen


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    given = {"x": torch.randn(shape, generator=generator), "scale": torch.tensor([-0.7]), "shift": torch.tensor([0.3])}
    return {k: v.to(dtype) for k, v in given.items()}


def formula(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return scale * torch.where(x > 0, x, 0) ** 2 + shift


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 41, 7), (3, 5, 4, 63), (0, 4), (100,)])
def test_equals_its_formula(backend, dtype, shape) -> None:
    given = inputs(*shape, dtype=dtype)
    for each in (given, {**given, "x": skewed(given["x"])}):
        ours = run(functools.partial(star_relu, backend=backend), each)
        for name, value in run(formula, widen(each)).items():
            # in half precision the gradient of a scalar is a sum of rounded numbers
            limit = TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 and name.endswith(("scale", "shift")) else 1)
            assert error(ours[name], value) <= limit, name


def test_gradcheck_twice() -> None:
    given = [v.requires_grad_() for v in inputs(3, 4, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(star_relu, given)
    assert torch.autograd.gradgradcheck(star_relu, given)


def test_transforms_and_forward_mode() -> None:
    x, scale, shift = inputs(3, 4, dtype=torch.float64).values()
    rows = torch.func.vmap(lambda row: star_relu(row, scale, shift))(x)
    torch.testing.assert_close(rows, formula(x, scale, shift))
    tangent = torch.randn_like(x)
    ours = torch.func.jvp(lambda x: star_relu(x, scale, shift), (x,), (tangent,))[1]
    torch.testing.assert_close(ours, 2 * scale * x.clamp_min(0) * tangent)


def test_opcheck_and_compile() -> None:
    given = [v.requires_grad_() for v in inputs(2, 3).values()]
    torch.library.opcheck(eager._op.op, tuple(given))
    compiled = torch.compile(star_relu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), star_relu(*given))


def test_keeps_one_map_and_leaves_its_input() -> None:
    given = {k: v.requires_grad_() for k, v in inputs(8, 16).items()}
    before = given["x"].detach().clone()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = star_relu(**given)
    assert sum(kept) == given["x"].numel() + 1
    y.sum().backward()
    assert torch.equal(given["x"], before)


def test_numbers_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match="scale"):
        star_relu(torch.ones(2), torch.ones(2), torch.ones(1))

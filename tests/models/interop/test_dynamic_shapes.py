"""One program or graph for all lengths and batches: nothing in a model asks a size for its value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo import create_mixer, create_model
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.selftest.case import Draw
from mixerzoo.models import build_model, model_config
from mixerzoo.tests.models.test_as_modules import VISION, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

LANGUAGE = ["transformer", "gla", "deltanet", "retnet", "mamba", "mamba2", "hyena", "fnet", "ponet"]
LENGTHS = (2, 5, 63, 64, 65, 130, 333)
SEQUENCES = ["delta", "linear_attention", "mamba2", "ponet"]
SLOW = ("vim2_tiny", "vmamba_tiny")  # minutes each; vim_tiny goes the same way
BATCHES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VISION]


@pytest.fixture(autouse=True)
def afresh() -> None:
    """The exporter compiles what a loop over chunks calls, and would take what it compiled for other sizes before."""
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("name", LANGUAGE)
def test_exported_with_a_dynamic_length(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"{name}_tiny", depth=1).eval()
    ids = torch.randint(0, model.vocab_size, (2, 100))
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: Dim("length", min=2, max=400)},)).module()
    for length in LENGTHS:
        ids = torch.randint(0, model.vocab_size, (2, length))
        torch.testing.assert_close(program(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BATCHES)
def test_exported_with_a_dynamic_batch(name: str) -> None:
    model, x = small(name), torch.randn(3, 3, 32, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_clips_exported_with_a_dynamic_batch() -> None:
    config: dict[str, Any] = dict(model_config("vfimamba_tiny"))
    config |= {"image_size": 32, "dim": 8, "depth": 1}
    torch.manual_seed(0)
    model = build_model(config).eval()
    shape = (config["in_chans"], config["frames"], 32, 32)
    x = torch.randn(2, *shape)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SEQUENCES)
def test_one_graph_for_all_lengths(name: str) -> None:
    """With gradients; two graphs where a mixer has another way for short sequences."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer: Any = create_mixer(name, 16)
    mixer.eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, backend=counter, dynamic=True, fullgraph=True)
    for length in (70, 100, 130, 200, 333):
        x = torch.randn(2, length, 16, requires_grad=True)
        y, wanted = compiled(x), mixer(x)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["ssd", "gla", "delta_rule", "segment_pool"])
def test_operators_of_compiled_graphs(name: str) -> None:
    """What `torch.compile` sees of a loop over chunks: shapes, strides and gradients are those of the loop."""
    case = find_ops()[name]
    inputs: dict[str, Any] = case.inputs(Draw(dtype=torch.float32), **case.odd[0])
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}

    class Call(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return case.run(**inputs | dict(zip(leaves, given, strict=True)), backend="eager")

    compiled = torch.compile(Call(), backend="aot_eager", fullgraph=True)
    ours, theirs = (
        made if isinstance(made, tuple) else (made,) for made in (compiled(*leaves.values()), Call()(*leaves.values()))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    found, wanted = (
        torch.autograd.grad(
            sum(y.sin().sum() for y in made), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        for made in (ours, theirs)
    )
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert hasattr(torch.ops.mixerzoo, f"{name}_eager")

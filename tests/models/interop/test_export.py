"""Models whose mixers have operators of their own, exported: other runtimes know PyTorch's calls only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo import create_model

SMALL: dict[str, dict[str, Any]] = {
    "afno_b16": {"dim": 16, "depth": 1, "mixer": {"name": "afno", "num_blocks": 4}},
    "affnet_tiny": {"dims": [16, 16, 16, 16], "depths": [0, 1, 0, 0], "mixer": {"name": "aff", "num_blocks": 4}},
    "vmamba_tiny": {"dims": [8, 8, 8, 8], "depths": [1, 0, 0, 0]},
    "vim_tiny": {"dim": 16, "depth": 1},
}


@pytest.fixture(autouse=True)
def afresh() -> None:
    """The exporter compiles what a loop over chunks calls, and would take what it compiled for other sizes before."""
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("name", SMALL)
def test_exported_and_in_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, image_size=32, **SMALL[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for every part to be seen in the result
            parameter.copy_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else 1 + 0.2 * parameter)
    x = torch.randn(1, 3, 32, 32)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)]
    wanted = model(x)
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-4, atol=1e-4)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), wanted, rtol=1e-3, atol=1e-4)

"""Saved Hugging Face folders in a process that has not imported mixerzoo: transformers finds it by `auto_map`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mixerzoo
import pytest
import torch
from mixerzoo.models.interop.huggingface import MixerZooForCausalLM, MixerZooForImageClassification
from safetensors.torch import load_file, save_file

LANGUAGE = {"backbone": "language", "vocab_size": 17, "dim": 32, "depth": 1, "mixer": "mamba2"}
VISION = {"backbone": "pyramid", "dims": [8], "depths": [1], "mixer": "pooling", "image_size": 32, "num_classes": 5}
SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, {auto}
assert "mixerzoo" not in sys.modules
assert type(AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)).__name__ == "MixerZooConfig"
model = {auto}.from_pretrained({folder!r}, trust_remote_code=True).eval()
inputs = load_file({folder!r} + "/inputs.st")["x"]
with torch.no_grad():
    save_file({{"y": model(inputs).logits}}, {folder!r} + "/outputs.st")
"""


@pytest.mark.parametrize(
    ("kind", "config", "auto"),
    [
        (MixerZooForCausalLM, LANGUAGE, "AutoModelForCausalLM"),
        (MixerZooForImageClassification, VISION, "AutoModelForImageClassification"),
    ],
)
def test_loads_where_nobody_imported_us(kind: type, config: dict, auto: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind.from_name(config).eval()  # type: ignore[attr-defined]
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    x = torch.randint(0, 17, (2, 9)) if config is LANGUAGE else torch.randn(2, 3, 32, 32)
    save_file({"x": x}, folder / "inputs.st")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "mixerzoo").symlink_to(Path(mixerzoo.__file__).resolve().parent)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "path"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", SCRIPT.format(auto=auto, folder=str(folder))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        torch.testing.assert_close(load_file(folder / "outputs.st")["y"], model(x).logits)

"""`mixerzoo.load`: what was trained computes the same in another place and process, plugins included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mixerzoo
import pytest
import torch
from mixerzoo import ConfigError

ROOT = Path(__file__).resolve().parents[2]

MIXER = '''
from torch import Tensor, nn
from mixerzoo import Mixer


class Scaled(Mixer, name="scaled_to_load"):
    """Scales the tokens."""

    axes = (1, 2)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.proj(x) * 0.9
'''


def child(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with this checkout as the package."""
    link = folder / "path"
    if not link.exists():
        link.mkdir()
        (link / "mixerzoo").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(link), "OMP_NUM_THREADS": "1", "MIXERZOO_PLUGINS": ""}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.py").write_text(MIXER)
    settings = ["train.max_steps=3", "train.batch_size=128", "model.dims=[8,16]", "tracker=null", "progress=false"]
    child(folder, "-m", "mixerzoo", "train", "plugins=[mine.py]", "mixer=scaled_to_load", "run_dir=run", *settings)
    return folder


SCRIPT = """
import sys, torch, mixerzoo
found = mixerzoo.load(sys.argv[1])
x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
print(found.model(x).flatten().tolist()[0], len(found.classes), found.task["name"], found.summary.get("status"))
"""


def test_a_moved_run_with_an_edited_plugin_computes_what_was_trained(trained: Path) -> None:
    first = child(trained, "-c", SCRIPT, "run").stdout
    assert first.split()[1:] == ["10", "digits", "finished"]
    moved = trained / "elsewhere" / "moved"
    shutil.copytree(trained / "run", moved)
    (trained / "mine.py").write_text(MIXER.replace("0.9", "0.1"))  # the run keeps the code that it was trained with
    assert child(trained, "-c", SCRIPT, str(moved)).stdout == first
    lone = child(trained, "-c", SCRIPT, str(moved / "checkpoints" / "best" / "model.safetensors")).stdout
    assert lone.split()[:3] == first.split()[:3]
    (trained / "mine.py").unlink()
    assert child(trained, "-c", SCRIPT, "run").stdout == first


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run and no file"):
        mixerzoo.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        mixerzoo.load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="holds no weights yet"):
        mixerzoo.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="does not say which model it holds"):
        mixerzoo.load(tmp_path / "other.safetensors")

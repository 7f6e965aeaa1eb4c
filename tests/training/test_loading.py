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
    settings = ["train.max_steps=40", "train.batch_size=128", "model.dims=[8,16]", "tracker=null", "progress=false"]
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
    (trained / "other.py").write_text(MIXER.replace("0.9", "0.1"))
    clash = "from mixerzoo import plugins; plugins.load_plugins(['other.py'])\ntry:" + SCRIPT.replace("\n", "\n    ")
    clash += "\nexcept mixerzoo.ConfigError as error: print(error)"
    assert "was trained with other code of the mixer" in child(trained, "-c", clash, "run").stdout
    (trained / "mine.py").unlink()
    assert child(trained, "-c", SCRIPT, "run").stdout == first


FIGURES = """
import sys, torch, mixerzoo
from mixerzoo.tasks import create_task
found = mixerzoo.load(sys.argv[1])
images, labels = create_task("digits").load()["test"]
inputs, more = found.preprocessing.batch(images)
print(float((found.model(inputs, **more).argmax(-1) == torch.from_numpy(labels)).float().mean()))
print(found.summary["final"]["top1"])
"""


def test_raw_images_give_the_score_of_the_run(trained: Path) -> None:
    ours, theirs = map(float, child(trained, "-c", FIGURES, "run").stdout.split())
    assert ours == pytest.approx(theirs, abs=1e-7)
    assert ours > 0.15  # of ten classes: it has learned something, so that another normalisation would show


GO_ON = """
import sys, torch, mixerzoo
first = mixerzoo.load(sys.argv[1]).model.state_dict()
model = mixerzoo.create_model(sys.argv[1], num_classes=3, **{"head.dropout": 0.25})
own = model.state_dict()
assert own["head.fc.weight"].shape[0] == 3
assert own.keys() == first.keys()
print(all(torch.equal(own[k], first[k]) for k in own if not k.startswith("head.fc.")), model.model_config["head"])
colour = mixerzoo.create_model(sys.argv[1] + "/checkpoints/last/model.safetensors", in_chans=3)
print(colour(torch.zeros(1, 3, 8, 8)).shape)
"""


def test_going_on_with_other_classes_and_channels(trained: Path) -> None:
    done = child(trained, "-c", GO_ON, "run")
    assert done.stdout.splitlines()[0].startswith("True ")
    assert "0.25" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1] == "torch.Size([1, 10])"
    assert "its classifier has 10 classes, the model 3: a fresh one is used" in done.stderr


LONE = """
import sys, mixerzoo
try:
    found = mixerzoo.load(sys.argv[1], plugins=sys.argv[2:])
    print(type(found.model.stages[0].blocks[0].mixer).__name__, found.preprocessing.kind)
except mixerzoo.ConfigError as error:
    print(error)
"""
WRAP = """
import mixerzoo
from mixerzoo.models.interop.huggingface import MixerZooForImageClassification
MixerZooForImageClassification.wrap(mixerzoo.load("run").model).save_pretrained("wrapped")
"""
UNWRAP = """
import sys, mixerzoo, torch
from mixerzoo import plugins
plugins.load_plugins(sys.argv[1:])
from transformers import AutoModelForImageClassification
try:
    print(AutoModelForImageClassification.from_pretrained("wrapped")(torch.zeros(1, 1, 8, 8)).logits.shape)
except mixerzoo.ConfigError as error:
    print(error)
try:
    print(mixerzoo.create_model("wrapped")(torch.zeros(1, 1, 8, 8)).shape)
except mixerzoo.ConfigError as error:
    print(error)
"""


def test_a_lone_file_and_a_wrapper_say_which_plugin_they_need(trained: Path) -> None:
    lone = trained / "given.safetensors"
    shutil.copy(trained / "run" / "checkpoints" / "best" / "model.safetensors", lone)
    assert str(trained).encode() not in lone.read_bytes()  # not where the plugin lay
    needs = (
        'needs the mixer "scaled_to_load" of the plugin mine.py, which is not loaded. Set MIXERZOO_PLUGINS=PATH/mine'
    )
    assert needs in child(trained, "-c", LONE, "given.safetensors").stdout
    plugin = str(trained / "run" / "plugins" / "0" / "mine.py")
    assert child(trained, "-c", LONE, "given.safetensors", plugin).stdout == "Scaled normalised\n"
    changed = trained / "changed" / "mine.py"
    changed.parent.mkdir()
    changed.write_text(MIXER.replace("0.9", "0.1"))
    assert "saved with other code of the mixer" in child(trained, "-c", LONE, "given.safetensors", str(changed)).stderr
    child(trained, "-c", WRAP)
    said = child(trained, "-c", UNWRAP).stdout.splitlines()
    assert len(said) == 2
    assert all(needs in line for line in said)
    assert child(trained, "-c", UNWRAP, plugin).stdout.splitlines() == ["torch.Size([1, 10])"] * 2


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
    with pytest.raises(ConfigError, match="does not say which model it holds"):
        mixerzoo.create_model(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="there is no folder or file runs/nothing, nor a model of this name"):
        mixerzoo.create_model("runs/nothing")
    with pytest.raises(ConfigError, match=r"checkpoint: .* beside .*, which has weights of its own"):
        mixerzoo.create_model(tmp_path / "other.safetensors", checkpoint="x.safetensors")

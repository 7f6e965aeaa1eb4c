"""The first hour of somebody who has the wheel, an empty folder and the README's mixer of ten lines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mixerzoo.tests.wheel import ROOT, build_wheel, clean_environment, installed

pytestmark = pytest.mark.slow

# the README's; everything here is about it
(MIXER,) = re.findall(r"```py\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.S)
EDITED = MIXER.replace("x - x.mean", "x - 0.5 * x.mean")
SHORT = ["train.max_steps=6", "model.dims=[8,16]", "train.batch_size=128", "progress=false"]


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    wheel = build_wheel(tmp_path_factory.mktemp("sources"))
    return installed(wheel, tmp_path_factory.mktemp("environment") / "env")


@pytest.fixture
def here(bin_folder: Path, tmp_path: Path) -> Here:
    (tmp_path / "empty").mkdir()
    return Here(bin_folder, tmp_path / "empty")


class Here:
    """An empty folder, and the commands of the environment in it."""

    def __init__(self, bin_folder: Path, folder: Path) -> None:
        self.bin, self.folder = bin_folder, folder
        self.environment = clean_environment()

    def __call__(self, program: str, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.folder, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    def train(self, *arguments: str, **options: int) -> str:
        return self("mixerzoo-train", *arguments, *SHORT, **options)

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("runs/*/summary.json"))


def test_the_package_is_the_wheel(here: Here) -> None:
    place = here("python", "-c", "import mixerzoo; print(mixerzoo.__file__)").strip()
    assert place.startswith(str(here.bin.parent / "lib"))


def test_a_mixer_of_ones_own(here: Here) -> None:
    (here.folder / "my_mixers.py").write_text(MIXER)
    mine = ["plugins=[my_mixers.py]", "mixer=my_contrast"]

    # checked
    assert " promises kept, 0 broken" in here("python", "-m", "mixerzoo", "check", "my_mixers.py")
    assert "One of your own: plugins=[FILE.py] mixer=NAME" in here.train("mixer=my_contrast", code=2)

    # trained, not twice, and again when it was edited
    here.train(*mine, "resume=auto")
    (first,) = here.runs()
    assert "my_contrast" in first.name
    assert "is finished already" in here.train(*mine, "resume=auto")
    (here.folder / "my_mixers.py").write_text(EDITED)
    assert "is finished already" not in here.train(*mine, "resume=auto")
    assert len(here.runs()) == 2
    assert (first / "plugins" / "0" / "my_mixers.py").read_text() == MIXER

    # compared
    text = here.train(
        "-m", "plugins=[my_mixers.py]", "mixer=my_contrast,pooling,identity", "seed=0,1", "ablation.costs=false"
    )
    (report,) = here.folder.glob("runs/*/report.html")
    assert "my_contrast" in text
    table = (report.parent / "results.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in table[1:]} == {"my_contrast", "pooling", "identity"}
    page = report.read_text()
    assert re.search(r"mixerzoo-train [^\"]*plugins=\[[^]\"]*my_mixers\.py\]", page)  # as typed
    assert "train.py" not in page

    # saved, and loaded in another process
    save = f"""
import mixerzoo, torch
from mixerzoo.models import save_model
found = mixerzoo.load({str(first)!r})
save_model(found.model, "mine.safetensors")
print(found.model(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)).sum().item(), len(found.classes))
"""
    load = """
import mixerzoo, torch
model = mixerzoo.load("mine.safetensors", plugins=["old/my_mixers.py"]).model
print(model(torch.linspace(-1, 1, 64).view(1, 1, 8, 8)).sum().item(), 10)
"""
    (here.folder / "old").mkdir()
    (here.folder / "old" / "my_mixers.py").write_text(MIXER)
    expected = here("python", "-c", save).splitlines()[-1]
    assert here("python", "-c", load).splitlines()[-1] == expected


def test_a_run_that_was_stopped_goes_on(here: Here) -> None:
    (here.folder / "my_mixers.py").write_text(MIXER)
    command = ["plugins=[my_mixers.py]", "mixer=my_contrast", "train.epochs=60", "run_dir=run", *SHORT[1:]]
    process = subprocess.Popen(
        [str(here.bin / "mixerzoo-train"), *command],
        cwd=here.folder, env=here.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = here.folder / "run" / "metrics.jsonl"
    for _ in range(600):
        if lines.exists() and process.poll() is None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said[-2000:]
    (again,) = re.findall(r"Continue with: mixerzoo-train (\S+)", said)
    (here.folder / "my_mixers.py").write_text("edited = 'beyond repair")  # the run has the code that it began with
    assert "finished already" not in here("mixerzoo-train", again)
    summary = json.loads((here.folder / "run" / "summary.json").read_text())
    assert summary["epochs"] == 60
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_the_same_by_an_entry_point(here: Here) -> None:
    (site,) = here.bin.parent.glob("lib/python*/site-packages")
    (site / "their_mixers.py").write_text(MIXER.replace("my_contrast", "their_mean"))
    facts = site / "theirs-1.0.dist-info"
    facts.mkdir(exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[mixerzoo.plugins]\nany = their_mixers\n")
    assert "their_mean" in here("python", "-m", "mixerzoo", "list", "mixers")
    here.train("mixer=their_mean")
    (site / "their_mixers.py").write_text(EDITED.replace("my_contrast", "their_mean"))
    assert "is finished already" not in here.train("mixer=their_mean", "resume=auto")
    assert len(here.runs()) == 2
    text = here.train("-m", "mixer=their_mean,identity", "ablation.costs=false")
    assert "their_mean" in text
    (site / "their_mixers.py").unlink()
    (facts / "entry_points.txt").unlink()


RAY = f"""
import ray
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.run import run

SHORT = {SHORT!r}

@ray.remote
def train(plugin, seed):
    settings = [f"plugins=[{{plugin}}]", "mixer=my_contrast", f"seed={{seed}}", "output_dir=" + FOLDER + "/runs"]
    return run(compose_config([*settings, *SHORT]), quiet=True)["plugins"][0]["parts"][0]["name"]

import os
FOLDER = os.getcwd()
ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
print(ray.get([train.remote(FOLDER + "/my_mixers.py", seed) for seed in (0, 1)]))
"""


def test_the_same_by_ray(here: Here) -> None:
    pytest.importorskip("ray")
    (here.folder / "my_mixers.py").write_text(MIXER)
    (here.folder / "by_ray.py").write_text(RAY)
    assert "['my_contrast', 'my_contrast']" in here("python", "by_ray.py").splitlines()
    assert len(here.runs()) == 2


@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_workers_of_a_sweep_see_the_variable(here: Here, launcher: str) -> None:
    pytest.importorskip(launcher)
    (here.folder / "my_mixers.py").write_text(MIXER)
    here.environment["MIXERZOO_PLUGINS"] = "my_mixers.py"
    workers = [f"ablation.launcher={launcher}", "ablation.workers=2", "ablation.threads=1", "ablation.costs=false"]
    here.train("-m", "mixer=my_contrast,identity", "seed=0,1", *workers)
    assert sum("my_contrast" in path.name for path in here.runs()) == 2
    assert all((path / "plugins" / "plugins.json").exists() for path in here.runs() if "my_contrast" in path.name)
    (table,) = here.folder.glob("runs/*/results.csv")
    assert len(table.read_text().splitlines()) == 3

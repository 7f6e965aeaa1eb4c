"""What CONTRIBUTING says about adding a mixer, done to the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the example's one file added."""
    folder = tmp_path_factory.mktemp("clone") / "mixerzoo"
    for name in ("kernels", "mixers", "models", "tasks", "training", "contract", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, folder / file.name)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    (folder / "mixers" / "decay_example.py").write_text(example)
    return folder


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)


def test_the_contract_tests_pick_it_up(copy: Path) -> None:
    done = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/mixers/test_contract.py", "-k", "decay_example"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 10, done.stdout[-500:]


def test_create_mixer_and_train_know_it(copy: Path) -> None:
    script = (
        "import mixerzoo, torch; m = mixerzoo.create_mixer('decay_example', 8);"
        f"assert mixerzoo.__file__.startswith({str(copy)!r}), mixerzoo.__file__;"
        "assert 'decay_example' in mixerzoo.list_mixers(causal=True); print(m(torch.randn(2, 5, 8)).shape)"
    )
    done = run(copy, "-c", script)
    assert "torch.Size([2, 5, 8])" in done.stdout, done.stderr
    typo = run(copy, "train.py", "mixer=decay_exampel")
    assert typo.returncode == 2
    assert 'Did you mean "decay_example"?' in typo.stderr + typo.stdout

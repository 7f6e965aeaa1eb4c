"""The wheel holds the package `mixerzoo` with its configs, and nothing else at the top level."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mixerzoo.tests.wheel import build_wheel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this checkout."""
    pytest.importorskip("setuptools", minversion="77")
    return build_wheel(tmp_path_factory.mktemp("sources"))


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"mixerzoo"}
    for path in [
        "train.py",
        "__main__.py",
        "plugins.py",
        "py.typed",
        "kernels/common/dispatch.py",
        "mixers/local/basic.py",
        "configs/train.yaml",
    ]:
        assert f"mixerzoo/{path}" in names
    for folder in ("kernels", "mixers", "models", "tasks", "training", "contract"):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"mixerzoo/{file.relative_to(ROOT)}" in names
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert f"mixerzoo/{file.relative_to(ROOT)}" in names


def test_an_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = (
        # triton is never needed
        "import sys; sys.modules['triton'] = None; import mixerzoo, mixerzoo.mixers.registry; "
        "assert mixerzoo.__file__.startswith({!r}), mixerzoo.__file__;"
        "assert not {{'models', 'kernels', 'mixers'}} & set(sys.modules); print(len(mixerzoo.list_models()));"
    ).format(str(tmp_path / "site"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(list((ROOT / "configs" / "model").glob("*.yaml")))
    typo = subprocess.run(
        [sys.executable, "-m", "mixerzoo.train", "model=poolformer_s13"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert typo.returncode == 2, typo.stderr[-2000:]
    assert 'Did you mean "poolformer_s12"?' in typo.stderr
    assert not list(tmp_path.glob("runs*"))

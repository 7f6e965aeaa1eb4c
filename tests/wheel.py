"""A wheel of this checkout, and an environment with it, for tests of what users install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "mixers", "models", "tasks", "training", "contract", "configs")
OTHERS = ("py.typed", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources in an empty folder: building leaves folders behind."""
    copy = folder / "anything"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), *(ROOT / name for name in OTHERS)]:
        shutil.copy(file, copy / file.name)
    script = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (copy / "dist").glob("*.whl")
    return built


def installed(wheel: Path, folder: Path) -> Path:
    """The `bin` folder of an environment of its own with the wheel; the other packages are those of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # the path alone, so that files in there that change the path, such as those of an editable install, are not read
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def clean_environment() -> dict[str, str]:
    """This environment without what would lead to the checkout."""
    dropped = ("PYTHONPATH", "MIXERZOO_PLUGINS", "TRITON_INTERPRET", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"OMP_NUM_THREADS": "1"}

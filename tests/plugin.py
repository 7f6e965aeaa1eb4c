"""pytest plugin: the repository root is a package for Python, but not one to pytest.

pytest would import it a second time, under the name of the folder, for the sake of a `setup_module` that it lacks. And
`python -m pytest` puts it on the path, where other packages that look for a library `kernels` would find ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None

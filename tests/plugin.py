"""pytest plugin: the repository root is a package for Python, but not one to pytest.

pytest would import it a second time, under the name of the folder, for the sake of a `setup_module` that it lacks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None

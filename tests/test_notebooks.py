"""The notebooks run from their first cell to their last, and are stored with what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def shown(cell: Any) -> list[str]:
    """The kinds of what a cell shows, without warnings."""
    return [output.output_type for output in cell.outputs if output.get("name") != "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_outputs_are_stored(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    kinds = {kind for cell in cells for kind in shown(cell)}
    assert "display_data" in kinds  # pictures
    assert "error" not in kinds
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # in order, in a fresh kernel
    assert path.stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "mixerzoo").symlink_to(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("MIXERZOO_PLUGINS", "")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    # every cell that showed something shows something again
    for cell, stored in zip(notebook.cells, nbformat.read(path, as_version=4).cells, strict=True):
        if stored.cell_type == "code":
            assert shown(cell) == shown(stored)

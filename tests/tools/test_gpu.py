"""`tools/gpu.sh`: stages have limits, results are kept as they come, and the table is short. Nothing needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mixerzoo.tools import gpu
from mixerzoo.tools.gpu import MOST_LINES, SECONDS, STAGES, Stage, kernel_lines, main, run_stage, table

ROOT = Path(gpu.__file__).resolve().parent.parent
WRITER = """
import json, sys, time
with open(sys.argv[1], "a") as file:
    file.write(json.dumps({"done": 1}) + "\\n")
    file.flush()
    print("written", flush=True)
    time.sleep(float(sys.argv[2]))
    file.write(json.dumps({"done": 2}) + "\\n")
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def stage(tmp_path):
    """A stage of commands `sleep status`."""
    script = tmp_path / "writer.py"
    script.write_text(WRITER)

    def make(*commands: str) -> Stage:
        words = tuple(f"{script} {{rows}} {command}" for command in commands)
        return Stage(10, words, gpu.other_lines)

    return make


def test_a_stage_that_is_cut_off_keeps_its_rows(stage, tmp_path):
    result = run_stage("card", stage("60 0", "0 0"), tmp_path, limit=2, rehearse=False)
    assert result["status"] == "cut off at its limit"
    assert result["rows"] == [{"done": 1}]  # and the second command was not begun
    assert result["seconds"] < 20
    assert run_stage("card", stage("0 0", "0 0"), tmp_path, limit=20, rehearse=False)["rows"] == [
        {"done": 1}, {"done": 2}, {"done": 1}, {"done": 2},
    ]  # fmt: skip
    failed = run_stage("card", stage("0 3"), tmp_path, limit=20, rehearse=False)
    assert failed["status"] == "exit status 3"
    assert len(failed["rows"]) == 2


def test_results_are_on_disk_after_every_stage(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", {"card": stage("0 0"), "kernels": stage("0 1")})
    assert main(["--out", str(tmp_path / "out")]) == 1
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(s["stage"], s["status"]) for s in written["stages"]] == [("card", "ok"), ("kernels", "exit status 1")]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"gpu.json", "log.txt", "table.txt"}
    assert "== kernels: exit status 1" in capsys.readouterr().out
    assert main(["--out", str(tmp_path / "out"), "--only", "card"]) == 0


def test_shares_are_those_of_seven_minutes():
    assert sum(stage.share for stage in STAGES.values()) == SECONDS


def test_without_hydra_stages_of_models_are_skipped(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    result = run_stage("train", STAGES["train"], tmp_path, limit=2, rehearse=True)
    assert "Hydra is missing" in result["status"]
    assert result["rows"] == []


def test_the_table_is_short(tmp_path):
    sizes = [
        {"op": f"op{i}", "size": "s", "backward": False, "what": "ours", "ms": 1.0, "floor_ms": 0.5} for i in range(99)
    ]
    results = [{"stage": "kernels", "status": "ok", "limit_s": 1, "rows": sizes}]
    lines = table(results, tmp_path / "none").splitlines()
    assert len(lines) == MOST_LINES
    assert lines[-1].endswith("more lines in gpu.json")


def test_lines_of_kernels():
    key = {"op": "gla", "size": "GLA 340M: 4 heads", "backward": True}
    rows = [
        {**key, "what": "ours", "ms": 0.5, "floor_ms": 0.1, "bound": "memory"},
        {**key, "what": "fla", "ms": 0.7},
        {**key, "what": "other", "ms": 0.6},
        {**key, "what": "ours in PyTorch, compiled", "failed": "OutOfMemoryError: no"},
    ]
    words = kernel_lines(rows)[1].split()
    assert words[:2] == ["gla", "both"]
    assert words[-5:] == ["0.500", "5.0", "failed", "other", "0.600"]


def test_the_script_makes_this_checkout_the_package(tmp_path):
    """Whole where Hydra is there, and the kernels alone where it is not."""
    log = tmp_path / "out" / "log.txt"
    command = [ROOT / "tools" / "gpu.sh", "--rehearse", "--only", "card", "--out", tmp_path / "out"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert "bf16_Tflop_per_s" in done.stdout


def test_mistakes_are_explained(capsys):
    assert main(["--only", "kernel"]) == 2
    assert 'Did you mean "kernels"?' in capsys.readouterr().err

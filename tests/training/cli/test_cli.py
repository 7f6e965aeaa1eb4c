"""The command itself, in processes of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mixerzoo.tests.training.utils import same, tensors
from mixerzoo.training.ablation.plan import arm_settings
from mixerzoo.training.ablation.preset import from_command_line
from mixerzoo.training.cli.main import main
from mixerzoo.training.config import PACKAGE

SMALL = ["model.dims=[8,16]", "train.batch_size=128", "train.device=cpu", "tracker=null"]


def start(script: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_typo_as_a_new_user_makes_it(tmp_path):
    process = start(PACKAGE / "train.py", "model=poolformer_s12", "mixer=atention", "task=digits", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith('error: mixer: "atention" is not known. Did you mean "attention"? Allowed: ')
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def copy_of_the_checkout(folder: Path) -> Path:
    """Another checkout, with a version of its own; returns its train.py."""
    for name in ("kernels", "mixers", "models", "tasks", "training", "configs"):
        shutil.copytree(PACKAGE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in PACKAGE.glob("*.py"):
        shutil.copy(path, folder / path.name)
    text = (folder / "__init__.py").read_text()
    (folder / "__init__.py").write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.0+copy"', text))
    return folder / "train.py"


def test_interrupted_by_a_signal_and_continued_as_it_says(tmp_path):
    """From a checkout, whose own code must run whatever is installed under the same name."""
    script = copy_of_the_checkout(tmp_path / "copy")
    process = start(script, *SMALL, "train.max_steps=100", "output_dir=here", cwd=tmp_path)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("here/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = re.search(r"stopped at step (\d+) and saved\. Continue with: python train\.py (resume=\S+)", err)
    assert found is not None, err
    assert 0 < int(found[1]) < 100

    again = start(script, found[2], cwd=tmp_path)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert f"continuing at step {found[1]}" in out
    summary = json.loads(next(tmp_path.glob("here/*/summary.json")).read_text())
    assert summary["steps"] == 100
    assert summary["environment"]["mixerzoo"] == "0.0.0+copy"


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code  # type: ignore[return-value]


def test_a_sweep_runs_every_combination_and_resumes(tmp_path, capsys):
    arguments = ["-m", *SMALL, "train.max_steps=1", "mixer=null,attention", f"output_dir={tmp_path}"]
    assert run_main(*arguments, "resume=auto") == 0
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert sorted(str(s["mixer"]) for s in summaries) == ["None", "attention"]
    first = capsys.readouterr().out
    assert "One seed: no interval" in first
    (folder,) = tmp_path.glob("ablation-sweep-*")
    assert {"report.html", "report.md", "results.csv"} <= {path.name for path in folder.iterdir()}
    assert "Sizes are not matched" in (folder / "report.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    assert run_main(*arguments, "resume=auto") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")} == before
    assert list(tmp_path.glob("ablation-sweep-*")) == [folder]
    again = capsys.readouterr().out
    assert "attention" in again
    for path in before:
        path.parent.rename(tmp_path / f"renamed-{path.parent.name}")
    assert run_main(*arguments) == 0
    assert sorted(p.parent.name for p in tmp_path.glob("*/summary.json")) == sorted(
        f"renamed-{path.parent.name}" for path in before
    )
    single = [a for a in arguments if a not in ("-m", "mixer=null,attention")]
    assert run_main(*single, "mixer=attention", "resume=auto") == 0  # a single run finds it, too
    assert len(list(tmp_path.glob("*/summary.json"))) == 2
    assert "_own_" not in first + again


@pytest.mark.parametrize(
    ("swept", "arms", "varied"),
    [
        (["mixer=identity,pooling", "seed=0,1"], ["identity", "pooling"], {}),
        (["model=metaformer_digits,metaformer_fashion"], ["metaformer_digits", "metaformer_fashion"], {}),
        (["mixer=pooling", "model.drop_path=0,0.1"], ["model.drop_path=0", "model.drop_path=0.1"], {}),
        (["mixer=identity,pooling", "model.drop_path=0,0.1"], ["identity", "pooling"], {"model.drop_path": [0, 0.1]}),
        (["seed=0,1,2"], ["as it is"], {}),
    ],
)
def test_what_a_sweep_compares(swept, arms, varied):
    ablation = from_command_line([*swept, "task=digits", "resume=auto"])
    assert (ablation.mixers, ablation.vary, ablation.match) == (arms, varied, "off")
    assert from_command_line([*swept, "ablation.match=parameters"]).match == "parameters"
    settings = [arm_settings(ablation, arm) for arm in arms]
    assert len({tuple(s) for s in settings}) == len(arms)
    if swept[0] == "mixer=pooling":
        assert all("mixer=pooling" in s for s in settings)


def test_a_sweep_by_a_launcher_of_hydra_ends_with_its_table(tmp_path, capsys):
    launcher = ["hydra/launcher=basic", f"hydra.sweep.dir={tmp_path}/multirun"]
    arguments = [
        "-m",
        *SMALL,
        "train.max_steps=1",
        "mixer=pooling,identity",
        f"output_dir={tmp_path}",
        "progress=false",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *launcher])
    assert stop.value.code == 0
    (folder,) = tmp_path.glob("ablation-sweep-*")
    results = json.loads((folder / "results.json").read_text())
    values = {cell["arm"]: [run["value"] for run in cell["runs"]] for cell in results["cells"]}
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("digits-*/summary.json")]
    assert sorted(values) == ["identity", "pooling"]
    assert sorted(run["value"] for run in runs) == sorted(v for arm in values.values() for v in arm)
    assert "train seconds" in capsys.readouterr().out  # a head of the table
    with pytest.raises(SystemExit) as stop:  # a mistake in one run: none starts
        main(["-m", *SMALL, "mixer=pooling", "mixer.pool_size=3,none", f"output_dir={tmp_path}/other", *launcher])
    assert stop.value.code == 2
    assert not (tmp_path / "other").exists()


def test_a_sweep_with_a_mistake_in_one_run_starts_none(tmp_path, capsys):
    output = tmp_path / "runs"
    arguments = ["-m", *SMALL, "train.max_steps=1", "mixer=attention", "mixer.head_dim=8,none", f"output_dir={output}"]
    assert run_main(*arguments) == 2
    assert "mixer.head_dim: 'none'" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "3"], ["--epochs", "key=value"]),
        (["resume=nowhere"], ["nowhere is not the folder of a run"]),
        (["resume=nowhere", "train.epochs=3"], ["train.epochs=3", "resume=auto"]),
        (["task=imagefolder", "task.root=nowhere"], ["nowhere does not exist"]),
    ],
)
def test_mistakes_end_with_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    for part in said:
        assert part in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Data parallel over gloo: the same batches, so the same weights up to rounding."""
    common = [*SMALL, "train.max_steps=12", "task.crop_padding=0", "progress=false"]
    # what `accelerate launch` runs on several GPUs; on CPUs it would look for mpirun
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch.append(str(PACKAGE / "train.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *common, "output_dir=two"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert run_main(*common, f"output_dir={tmp_path / 'one'}") == 0
    folders = [next((tmp_path / name).glob("*/summary.json")).parent for name in ("one", "two")]
    one, two = (json.loads((f / "summary.json").read_text()) for f in folders)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["final"]["loss"] == pytest.approx(one["final"]["loss"], rel=1e-3)
    a, b = (tensors(folder) for folder in folders)
    assert not same(a, b)
    assert all((a[k] - b[k]).abs().max() < 2e-3 for k in a)


def test_help_into_a_reader_that_stops():
    for command in ("train.py --help", "train.py mixer=mamba2 --help"):
        shell = f"set -o pipefail; {sys.executable} {PACKAGE}/{command} | head -1"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr[-500:]
        assert done.stdout.count("\n") == 1

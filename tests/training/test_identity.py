"""A run is of its data: what changed is seen, said, and never mixed into one result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task
from mixerzoo.tests.training.utils import cut
from mixerzoo.training.ablation.plan import make_plan
from mixerzoo.training.ablation.preset import from_command_line
from mixerzoo.training.ablation.report.folders import plan_of
from mixerzoo.training.ablation.sweep import ablate
from mixerzoo.training.ablation.work import execute
from mixerzoo.training.checkpoint import read_facts
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.config import identity
from mixerzoo.training.identity import data_lines, describe_data, tells
from mixerzoo.training.run import run
from PIL import Image

TINY = ["train.batch_size=4", "train.max_steps=2", "train.eval_every=1", "train.device=cpu", "tracker=null"]
TINY += ["progress=false"]
VISION = ["model=metaformer_digits", "model.dims=[8,16]", "task=imagefolder", "task.image_size=8"]
LANGUAGE = ["model=transformer_tiny", "model.dim=16", "model.depth=1", "task.sequence_length=8"]
TEXTS = [
    "model=transformer_tiny",
    "model.causal=false",
    "model.dim=16",
    "model.depth=1",
    "task=text_folder",
    "task.max_bytes=16",
]


def images(root):
    random = np.random.RandomState(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.fromarray(random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
                picture.save(root / split / name / f"{i}.bmp")
    return [*VISION, f"task.root={root}"]


def texts(root):
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                (root / split / name / f"{i}.txt").write_text(f"{split} of {name}, number {i}")
    return [*TEXTS, f"task.root={root}"]


def corpus(root):
    root.mkdir(parents=True)
    (root / "book.txt").write_text("".join(f"sentence {i}. " for i in range(100)))
    return [*LANGUAGE, "task=text", f"task.path={root / 'book.txt'}"]


def tokens(root):
    root.mkdir(parents=True)
    np.random.RandomState(0).randint(0, 50, 2000).astype("<u2").tofile(root / "t.bin")
    return [*LANGUAGE, "task=token_bin", f"task.train={root / 't.bin'}", "task.vocab_size=50", "task.val_fraction=0.1"]


def edit_image(root):
    path = root / "train" / "cat" / "0.bmp"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the same size, and time does not tell
    path.write_bytes(data)


def edit_text(root):
    (root / "train" / "cat" / "0.txt").write_text("train of cats, number 0")


def rename_class(root):
    for split in ("train", "val", "test"):
        (root / split / "dog").rename(root / split / "wolf")


def delete_test(root):
    shutil.rmtree(root / "test")


def edit_corpus(root):
    path = root / "book.txt"
    path.write_text(path.read_text().replace("sentence 3.", "sentence 4."))


def shuffle_tokens(root):
    values = np.fromfile(root / "t.bin", "<u2")
    np.random.RandomState(1).shuffle(values)
    values.tofile(root / "t.bin")


CHANGES = [
    (images, edit_image, "data: SHA-256"),
    (images, rename_class, "classes: cat, dog there, cat, wolf here"),
    (images, delete_test, "split test: 8 samples there, none here"),
    (texts, edit_text, "data: SHA-256"),
    (texts, rename_class, "classes: cat, dog there, cat, wolf here"),
    (texts, delete_test, "split test: 8 samples there, none here"),
    (corpus, edit_corpus, "data: SHA-256"),
    (tokens, shuffle_tokens, "data: SHA-256"),
]
IDS = [f"{make.__name__}-{change.__name__}" for make, change, _ in CHANGES]


@pytest.mark.parametrize(("make", "change", "said"), CHANGES, ids=IDS)
def test_changed_data_are_another_run_and_never_continued(make, change, said, tmp_path, monkeypatch):
    settings = [*make(tmp_path / "data"), *TINY, f"output_dir={tmp_path / 'runs'}"]
    first = run(compose_config([*settings, "resume=auto"]), quiet=True)
    stopped = cut(monkeypatch, compose_config([*settings, f"run_dir={tmp_path / 'stopped'}"]), 1)
    again = run(compose_config([*settings, "resume=auto"]), quiet=True)
    assert again == json.loads(json.dumps(first))  # as it is, it is done
    change(tmp_path / "data")
    # by name: refused, finished or not, and it is said why
    finished = next((tmp_path / "runs").glob("*/summary.json")).parent
    for folder in (stopped, finished):
        with pytest.raises(ConfigError, match=f"no longer those that .*{said}"):
            run(replace(compose_config(settings), resume=str(folder)), quiet=True)
    with pytest.raises(ConfigError, match=f"another configuration, seed, code or data: .*{said}"):
        run(compose_config([*settings, f"run_dir={stopped}", "resume=auto"]), quiet=True)
    # by itself: a run of its own
    other = run(compose_config([*settings, "resume=auto"]), quiet=True)
    assert other["identity"] != first["identity"]
    assert tells(other["data"]) != tells(first["data"])
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2


def test_a_run_that_goes_on_with_its_data_does(tmp_path, monkeypatch):
    settings = [*tokens(tmp_path / "data"), *TINY, f"output_dir={tmp_path / 'runs'}"]
    folder = cut(monkeypatch, compose_config(settings), 1)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(tmp_path / "copy", tmp_path / "data")  # the same bytes, at another time
    assert run(replace(compose_config(settings), resume=str(folder)), quiet=True)["steps"] == 2


def test_one_table_is_of_one_set_of_data(tmp_path):
    """A corpus that changes between two starts of a sweep makes another sweep, and no run of the first is used."""
    settings = [*corpus(tmp_path / "data"), *TINY, f"output_dir={tmp_path / 'runs'}", "ablation.costs=false"]
    settings += ["mixer=attention,identity", "seed=0", "ablation.match=off", "optimizer.lr=1e-3"]
    results = ablate(from_command_line(settings), progress=False)
    edit_corpus(tmp_path / "data")
    again = ablate(from_command_line(settings), progress=False)
    assert again["folder"] != results["folder"]
    assert again["data"]["sha256"] != results["data"]["sha256"]
    folders = [{run["folder"] for cell in r["cells"] for run in cell["runs"]} for r in (results, again)]
    assert [len(f) for f in folders] == [2, 2]
    assert not folders[0] & folders[1]
    # in a folder that is named it is refused
    named = [*settings, f"ablation.dir={tmp_path / 'mine'}"]
    ablate(from_command_line(named), progress=False)
    edit = (tmp_path / "data" / "book.txt").read_text()
    (tmp_path / "data" / "book.txt").write_text(edit + "The end.")
    with pytest.raises(ConfigError, match=r"holds another ablation, of other data: .*SHA-256"):
        ablate(from_command_line(named), progress=False)
    # and a report over runs of both is refused
    with pytest.raises(ConfigError, match=r"the runs are of different data: .*cannot share a table"):
        plan_of([tmp_path / "runs"], out=tmp_path / "out")


def test_data_that_change_while_a_sweep_runs_are_refused(tmp_path):
    settings = [*corpus(tmp_path / "data"), *TINY, f"output_dir={tmp_path / 'runs'}", "ablation.costs=false"]
    plan = make_plan(from_command_line([*settings, "mixer=attention", "seed=0", "optimizer.lr=1e-3"]))
    edit_corpus(tmp_path / "data")
    from mixerzoo.training.ablation.plan import _opened

    _opened.cache_clear()  # as in another process
    problem = execute(plan, plan.jobs()[0])
    assert problem is not None
    assert problem["kind"] == "refused"
    assert "the data changed since the ablation was started" in problem["error"]
    assert not list((tmp_path / "runs").glob("*/summary.json"))


def test_arms_of_different_data_are_named(tmp_path):
    corpus(tmp_path / "one")
    settings = [*corpus(tmp_path / "two"), *TINY, f"output_dir={tmp_path / 'runs'}", "ablation.costs=false"]
    ablation = from_command_line([*settings, "mixer=attention,identity", "seed=0", "ablation.match=off"])
    edit_corpus(tmp_path / "one")
    ablation.arms["identity"] = {"mixer": "identity", "task.path": str(tmp_path / "one" / "book.txt")}
    warnings = ablate(ablation, progress=False)["warnings"]
    assert any(w.startswith("Not of one set of data: identity, and attention: data: SHA-256") for w in warnings)


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path):
    settings = [*tokens(tmp_path / "data"), *TINY, f"run_dir={tmp_path / 'run'}"]
    run(compose_config(settings), quiet=True)
    other = ["seed=5", "train.max_steps=3", "mixer=identity", "resume=auto", "output_dir=x"]
    changed = compose_config([*settings, *other])
    with pytest.raises(ConfigError) as caught:
        run(changed, quiet=True)
    message = str(caught.value)
    mixer = "mixer.name: not set there, identity here"
    for said in ("seed: 0 there, 5 here", "train.max_steps: 2 there, 3 here", mixer):
        assert said in message
    assert "output_dir" not in message
    assert "resume:" in message
    with pytest.raises(ConfigError, match=r"data: code: version \w{12} there, 123456789abc here"):
        run(compose_config([*settings, "resume=auto"]), code="123456789abcdef", quiet=True)


def test_names_of_classes_are_kept_with_the_weights(tmp_path):
    summary = run(compose_config([*images(tmp_path / "data"), *TINY, f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert summary["data"]["classes"] == ["cat", "dog"]
    assert summary["data"]["counts"] == {"train": [4, 4], "val": [4, 4], "test": [4, 4]}
    for name in ("best", "last"):
        facts = read_facts(tmp_path / "run" / "checkpoints" / name / "model.safetensors")
        assert facts["classes"] == ["cat", "dog"]
        assert facts["data"] == summary["data"]["sha256"]
        assert facts["task"]["name"] == "imagefolder"
        assert facts["identity"] == summary["identity"]


def test_the_log_shows_classes_and_what_was_left_out(tmp_path, capsys):
    settings = [*images(tmp_path / "data"), *TINY, f"run_dir={tmp_path / 'run'}"]
    (tmp_path / "data" / "train" / ".hidden").mkdir()
    (tmp_path / "data" / "train" / "cat" / "note.txt").write_text("x")
    run(compose_config(settings))
    out = capsys.readouterr().out
    assert "train, 2 classes: cat 4, dog 4" in out
    assert "left out, hidden names: train/.hidden" in out
    assert "left out, files of another kind (.txt): train/cat/note.txt" in out


def test_many_classes_are_shown_in_part():
    data = {"classes": [f"c{i}" for i in range(20)], "counts": {"train": list(range(20))}, "notes": ["a note"]}
    assert data_lines(data) == [
        "train, 20 classes: c19 19, c18 18, c17 17, c16 16, c15 15, c14 14, ... (11 more), c2 2, c1 1, c0 0",
        "a note",
    ]


@pytest.mark.parametrize("name", ["digits", "moving_digits", "pixels", "listops"])
def test_every_task_of_classes_counts_them(name):
    small = {"num_train": 40, "num_eval": 8}
    own = {"listops": {"min_length": 5, "max_length": 40, **small}, "moving_digits": small}
    task = create_task(name, **own.get(name, {}))
    task.open()
    data = describe_data(task)
    for split, size in data["sizes"].items():
        assert sum(data["counts"][split]) == size
        assert len(data["counts"][split]) == len(task.classes)


def test_identity_is_of_fingerprint_classes_and_sizes():
    config = compose_config()
    data = {"sha256": "a" * 64, "sizes": {"train": 3, "val": 1}, "classes": ["cat", "dog"]}
    found = {identity(config, "code", d) for d in (data, {**data, "sha256": "b" * 64}, {**data, "sizes": {"train": 4}})}
    found |= {identity(config, "code", {**data, "classes": ["cat", "wolf"]}), identity(config, "code")}
    assert len(found) == 5
    assert identity(config, "code", dict(reversed(data.items()))) == identity(config, "code", data)


def test_where_things_lie_may_be_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose_config(['output_dir="~/runs"', 'run_dir="~/mine"', "resume=auto"])
    assert (config.output_dir, config.run_dir, config.resume) == (f"{tmp_path}/runs", f"{tmp_path}/mine", "auto")
    assert Path(str(config.run_dir)).is_absolute()

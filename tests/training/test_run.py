"""Runs: what they learn, what they leave behind, how they continue and how they fail."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model
from mixerzoo.tests.training.utils import cut, same, small, tensors
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.loop import DivergedError, Trainer
from mixerzoo.training.run import run
from mixerzoo.training.run_folder import read_config, read_lines

# everything that draws random numbers or keeps a state of its own
EVERYTHING = [
    "train.ema=0.9",
    "train.accumulate=2",
    "model.drop_path=0.3",
    "model.head.dropout=0.2",
    "task.mixup=0.4",
    "task.cutmix=1.0",
    "task.erase=0.3",
    "task.flip=true",
    "task.label_smoothing=0.1",
]


def folder_of(output: Path) -> Path:
    return next(path.parent for path in output.glob("*/config.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    summary = run(small(output, "optimizer.lr=0.02", "train.epochs=4", "tracker=tensorboard"))
    return folder_of(output), summary


def test_it_learns_and_says_what_it_did(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["status"] == "finished"
    assert summary["split"] == "test"
    assert summary["metric"] == "top1"
    assert summary["value"] == summary["final"]["top1"] > 0.5
    assert 0 < summary["final"]["loss"] < 2.0
    assert summary["final"]["top5"] > summary["final"]["top1"]
    confusion = torch.tensor(summary["final"]["confusion"])
    assert confusion.shape == (10, 10)
    assert confusion.sum() == summary["data"]["sizes"]["test"] == 360
    assert confusion.trace() / 360 == pytest.approx(summary["value"])
    assert summary["steps"] == 36
    assert summary["throughput"]["count"] == 33  # the first three are warm-up
    assert summary["throughput"]["p25"] <= summary["throughput"]["median"] <= summary["throughput"]["p75"]
    assert summary["flops"] > summary["flops_matrix"] > 0
    assert len(summary["data"]["sha256"]) == 64
    assert summary["peak_memory_bytes"] > 1 << 20
    assert summary["environment"]["torch"] == torch.__version__
    model = create_model(read_config(folder)["model"], num_classes=10, in_chans=1, image_size=[8, 8])
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())


def test_files_of_a_run(finished):
    folder, summary = finished
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [9, 18, 27, 36]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert summary["best"]["value"] == max(line["val"]["top1"] for line in lines)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("tensorboard/events*"))
    weights = folder / summary["weights"]
    model = create_model(
        read_config(folder)["model"], num_classes=10, in_chans=1, image_size=[8, 8], checkpoint=weights
    )
    assert same(dict(model.state_dict()), tensors(folder, "best/model"))


def test_the_same_run_is_the_same_to_the_bit_and_nothing_is_overwritten(finished, tmp_path):
    first, second = run(small(tmp_path)), run(small(tmp_path))
    folders = sorted(path.parent for path in tmp_path.glob("*/summary.json"))
    assert len(folders) == 2
    assert folders[1].name == folders[0].name + "-2"
    assert same(tensors(folders[0]), tensors(folders[1]))
    assert first["final"] == second["final"]
    other = run(small(tmp_path / "other", "seed=1"))
    assert other["final"]["loss"] != first["final"]["loss"]
    assert not same(tensors(folder_of(tmp_path / "other")), tensors(folders[0]))


@pytest.mark.parametrize("step", [5, 9, 14])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(step, tmp_path, monkeypatch):
    """In mid-epoch before and after an evaluation, and just before one."""
    whole = small(tmp_path / "whole", *EVERYTHING)
    summary = run(whole)
    folder = cut(monkeypatch, small(tmp_path / "cut", *EVERYTHING), step)
    assert not (folder / "summary.json").exists()
    assert torch.load(folder / "checkpoints/last/state.pt", weights_only=True)["step"] == step
    again = run(replace(small(tmp_path / "cut", *EVERYTHING), resume=str(folder)))

    reference = folder_of(tmp_path / "whole")
    for name in ("last/model", "last/ema", "best/model"):
        assert same(tensors(folder, name), tensors(reference, name)), name
    assert not same(tensors(folder, "last/model"), tensors(folder, "last/ema"))
    assert again["final"] == summary["final"]
    ours, theirs = (read_lines(f / "metrics.jsonl") for f in (folder, reference))
    for line in (*ours, *theirs):
        del line["seconds"], line["throughput"]
    assert ours == theirs


def test_a_second_cut_and_a_crash_after_the_checkpoint(tmp_path, monkeypatch):
    run(small(tmp_path / "whole"))
    config = small(tmp_path / "cut")
    folder = cut(monkeypatch, config, 4, signal.SIGTERM)
    assert cut(monkeypatch, replace(config, resume=str(folder)), 12) == folder
    with open(folder / "metrics.jsonl", "a") as f:  # evaluated, but the process died before it could save
        f.write(json.dumps({"step": 18, "train_loss": 0.0, "val": {"top1": 1.0}}) + '\n{"step": 2')
    run(replace(config, resume=str(folder)))
    assert same(tensors(folder), tensors(folder_of(tmp_path / "whole")))
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [9, 18]
    assert read_lines(folder / "metrics.jsonl")[-1]["val"]["top1"] < 1


def test_auto_continues_and_then_skips(tmp_path, monkeypatch):
    config = small(tmp_path, "resume=auto")
    folder = cut(monkeypatch, config, 5)
    summary = run(config)
    assert folder_of(tmp_path) == folder
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self: pytest.fail("a finished run was repeated"))
        assert run(config) == json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 18
    run(small(tmp_path, "resume=auto", "seed=3"))
    assert len(list(tmp_path.glob("*/summary.json"))) == 2


def test_a_folder_of_another_run_is_refused(tmp_path):
    config = small(tmp_path, f"run_dir={tmp_path / 'mine'}", "train.epochs=1")
    run(config)
    with pytest.raises(ConfigError, match="not empty"):
        run(config)
    with pytest.raises(ConfigError, match="another configuration"):
        run(replace(config, resume="auto", seed=5))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path, monkeypatch):
    config = small(tmp_path)
    folder = cut(monkeypatch, config, 5)
    path = folder / "checkpoints" / "last" / ("state.pt" if damage == "no state" else "model.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(ConfigError, match=path.name) as caught:
        run(replace(config, resume=str(folder)))
    assert "damaged" in str(caught.value) or "missing" in str(caught.value)


def test_a_save_that_was_interrupted_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config = small(tmp_path)
    folder = cut(monkeypatch, config, 5)
    last = folder / "checkpoints" / "last"
    last.rename(last.with_name("last.old"))  # died between the renames
    (last.with_name("last.new")).mkdir()
    run(replace(config, resume=str(folder)))
    run(small(tmp_path / "whole"))
    assert same(tensors(folder), tensors(folder_of(tmp_path / "whole")))
    assert sorted(p.name for p in last.parent.iterdir()) == ["best", "last"]


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    from mixerzoo.tasks import task_class

    config = small(tmp_path, "train.epochs=3")
    digits = task_class("digits")
    original, seen = digits.loss, []

    def loss(self, model, batch):
        seen.append(batch["index"])
        return original(self, model, batch) * (float("nan") if len(seen) == 12 else 1.0)

    monkeypatch.setattr(digits, "loss", loss)
    with pytest.raises(DivergedError) as caught:
        run(config)
    folder = folder_of(tmp_path)
    message = str(caught.value)
    assert "nan at step 11" in message
    assert ", ".join(map(str, seen[-1][:20].tolist())) in message
    record = json.loads((folder / "diverged.json").read_text())
    assert record["samples"] == seen[-1].tolist()
    assert str(folder / "checkpoints" / "last") in message
    state = torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert state["step"] == 9
    assert all(t.isfinite().all() for t in tensors(folder).values())


WRONG = {
    "model.num_classes=7": ["model.num_classes", "7", "10"],
    "model.image_size=32": ["model.image_size", "32", "[8, 8]", "task.image_size"],
    "model.in_chans=3": ["model.in_chans", "3", "1"],
    "mixer.pool=5": ["mixer.pool", "mixer=NAME"],
    "train.batch_size=4096": ["train.batch_size", "4096", "1257"],
    "optimizer.beta=[0.9,0.9]": ["optimizer.beta", 'Did you mean "betas"?'],
    "optimizer.lr=-1": ["optimizer.lr", "-1"],
    "optimizer.betas=[2.0,0.9]": ["optimizer", "2.0"],
    "task.crop=3": ["task.crop", 'Did you mean "crop_padding"?'],
    "task.flip=3": ["task.flip", "3", "bool"],
    "task.randaugment=strong": ["task.randaugment", "strong", "rand-m9"],
    "task.label_smoothing=1.5": ["task.label_smoothing", "1.5"],
    "model.dims=[8]": ["model.dims", "1 widths for 2 stages"],
    "model.dim=[8,8]": ["model.dim", 'Did you mean "dims"?'],
    "model.mixer=[conv,atention]": ["model.mixer[1]", "atention", '"attention"'],
    "train.precision=fp16": ["train.precision", "fp16", "GPU"],
    "tracker=tensorbord": ["tracker", "tensorbord", '"tensorboard"'],
    "checkpoint=nowhere.safetensors": ["checkpoint", "nowhere.safetensors"],
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_refused_before_a_folder_is_made(text, tmp_path):
    output = tmp_path / "runs"
    with pytest.raises(ConfigError) as caught:
        run(small(output, text))
    for part in WRONG[text]:
        assert part in str(caught.value), str(caught.value)
    assert not output.exists()


def test_an_image_size_that_the_patches_do_not_divide(tmp_path):
    config = compose_config(["model=vit_tiny_patch16", f"output_dir={tmp_path / 'runs'}", "tracker=null"])
    with pytest.raises(ConfigError, match=r"image_size.*8x8.*16x16"):
        run(config)
    assert not (tmp_path / "runs").exists()


def test_an_option_of_a_mixer_is_checked(tmp_path):
    with pytest.raises(ConfigError, match=r'mixer\.hed_dim.*Did you mean "head_dim"'):
        run(small(tmp_path / "runs", "mixer=attention", "mixer.hed_dim=4"))
    with pytest.raises(ConfigError, match=r"mixer\.head_dim.*wide"):
        run(small(tmp_path / "runs", "mixer=attention", "mixer.head_dim=wide"))
    assert not (tmp_path / "runs").exists()


def test_another_mixer_with_nothing_else_changed(tmp_path):
    summaries = [run(small(tmp_path, "train.max_steps=2", *o)) for o in ([], ["mixer=attention"])]
    assert [s["mixer"] for s in summaries] == [None, "attention"]
    assert summaries[0]["parameters"] != summaries[1]["parameters"]
    configs = [read_config(Path(path).parent) for path in tmp_path.glob("*/summary.json")]
    differing = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differing == {"mixer"}


def test_weights_to_start_from(finished, tmp_path):
    folder, summary = finished
    start = run(small(tmp_path, f"checkpoint={folder / summary['weights']}", "train.max_steps=1", "optimizer.lr=1e-9"))
    assert start["final"]["top1"] == pytest.approx(summary["value"])


def test_bfloat16(tmp_path):
    exact, half = (run(small(tmp_path / p, f"train.precision={p}", "train.max_steps=5")) for p in ("no", "bf16"))
    assert exact["final"]["loss"] != half["final"]["loss"]
    assert half["final"]["loss"] == pytest.approx(exact["final"]["loss"], rel=0.02)
    assert tensors(folder_of(tmp_path / "bf16"))["stem.conv.weight"].dtype == torch.float32


def test_accumulation_and_workers_change_nothing_but_rounding(tmp_path):
    base = ["train.max_steps=4", "task.crop_padding=0"]
    runs = {
        "one": [],
        "parts": ["train.accumulate=4"],
        "workers": ["train.workers=2"],
    }
    for name, overrides in runs.items():
        run(small(tmp_path / name, *base, *overrides))
    one, parts, workers = (tensors(folder_of(tmp_path / name)) for name in runs)
    assert same(one, workers)
    assert not same(one, parts)
    assert all(torch.allclose(one[k], parts[k], atol=2e-4) for k in one)


def test_the_last_weights_can_be_chosen(tmp_path):
    summary = run(small(tmp_path, "train.select=last", "train.ema=0.5", "train.epochs=1"))
    folder = folder_of(tmp_path)
    assert (folder / summary["weights"]).exists()
    assert summary["weights"].endswith("last/ema.safetensors")


@pytest.mark.slow
def test_compiled_training_gives_the_same(tmp_path):
    plain, compiled = (
        run(small(tmp_path / str(c), f"train.compile={c}", "train.max_steps=3", "train.eval_every=9"))
        for c in ("false", "true")
    )
    assert compiled["final"]["loss"] == pytest.approx(plain["final"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_the_default_run_reaches_97_percent(tmp_path):
    summary = run(compose_config([f"output_dir={tmp_path}", "progress=false"]))
    assert summary["value"] >= 0.97
    assert summary["train_seconds"] < 120

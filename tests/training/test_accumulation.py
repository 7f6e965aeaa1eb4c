"""The loss of an optimizer step is the mean over its targets, however the step is divided into parts."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mixerzoo.tasks import create_task, list_tasks
from mixerzoo.tasks.sequence.sequence import IGNORE
from mixerzoo.tests.training.utils import cut, tensors
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.config import PACKAGE
from mixerzoo.training.loop import Trainer
from mixerzoo.training.run import make_model, make_task, run

# what a task needs to be small; those that need files or the network are made in the tests of their own
NEEDS_FILES = ("cifar10", "cifar100", "hf_text", "hf_text_classes", "hfds", "imagefolder", "imagenet", "kjv")
NEEDS_FILES += ("kjv_sections", "fashion_mnist", "fashion_mnist_10k", "text", "text_folder", "token_bin")
SMALL = {"num_train": 24, "num_eval": 4}
OWN = {"listops": {"min_length": 5, "max_length": 40}}


def whole_batch(task, count):
    return task.fetch("train", torch.arange(count), train=False, generator=torch.Generator().manual_seed(0))


def part(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def fixed_outputs(shape_of):
    """A model whose outputs are of the right shape and a matter of the sample's number alone."""

    weight = torch.randn(shape_of, generator=torch.Generator().manual_seed(0))

    def model(x, **_):
        return torch.sin(x.float().flatten(1).mean(1).view(-1, *[1] * len(shape_of)) + weight)

    return model


def output_shape(task):
    sizes = task.model_kwargs()
    if "vocab_size" in sizes and "num_classes" not in sizes:
        return (sizes["sequence_length"], sizes["vocab_size"])
    if getattr(task, "classes", None):
        return (len(task.classes),)
    return (1, *sizes["image_size"])


@pytest.mark.parametrize("name", [n for n in list_tasks() if n not in NEEDS_FILES])
def test_losses_of_parts_weighted_by_their_targets_are_the_loss_of_the_whole(name):
    task = create_task(name, **OWN.get(name, {}))
    if hasattr(task, "num_train") or hasattr(task, "counts"):
        task = create_task(name, **SMALL, **OWN.get(name, {}))
    task.open()
    batch, model = whole_batch(task, 6), fixed_outputs(output_shape(task))
    whole = task.loss(model, batch) * task.targets(batch)
    pieces = [part(batch, rows) for rows in (slice(0, 1), slice(1, 3), slice(3, 6))]
    assert sum(int(task.targets(piece)) for piece in pieces) == int(task.targets(batch))
    torch.testing.assert_close(sum(task.loss(model, p) * task.targets(p) for p in pieces), whole)


def test_a_part_without_targets_has_no_loss_and_no_gradient():
    task = create_task("mqar", **SMALL)
    task.open()
    batch = whole_batch(task, 2)
    batch["target"] = torch.full_like(batch["target"], IGNORE)
    logits = torch.zeros(2, 64, 8192, requires_grad=True)
    loss = task.loss(lambda ids: logits, batch)
    loss.backward()
    assert (loss.item(), int(task.targets(batch))) == (0.0, 0)
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


MASKED = ["model=fnet_tiny", "model.dim=32", "model.depth=1", "task=python_text", "task.objective=masked_lm"]
MASKED += ["task.sequence_length=24", "task.mask_fraction=0.1", "task.eval_bytes=200", "train.batch_size=32"]
MASKED += ["train.max_steps=1", "train.clip_grad=null", "train.device=cpu", "tracker=null", "progress=false"]


def gradients_of_a_step(config, monkeypatch):
    """Gradients that the loop hands to the optimizer in the first step, and the parts that it had."""
    found = {}
    original = Trainer._agree

    def keep(self, loss):
        found["loss"] = float(loss)
        found["gradient"] = {n: p.grad.clone() for n, p in self.raw.named_parameters() if p.grad is not None}
        return original(self, loss)

    step = Trainer._train_step

    def watch(self, parts):
        found["parts"] = parts
        return step(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agree", keep)
        patch.setattr(Trainer, "_train_step", watch)
        run(config, quiet=True)
    return found


def test_sixteen_parts_have_the_gradient_of_the_whole_batch(tmp_path, monkeypatch):
    config = compose_config([*MASKED, "train.accumulate=16", f"output_dir={tmp_path}"])
    found = gradients_of_a_step(config, monkeypatch)
    parts = found["parts"]
    task = make_task(config)
    task.open()
    counts = [int(task.targets(p)) for p in parts]
    assert len(set(counts)) > 3  # otherwise the mean of means would do
    model = make_model(config, task).train()
    whole = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
    loss = torch.nn.functional.cross_entropy(
        model(whole["input"]).flatten(0, 1), whole["target"].flatten(), ignore_index=IGNORE
    )
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert (found["gradient"][name] - parameter.grad).abs().max() < 1e-4 * scale, name
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (sum(task.loss(model, p) for p in parts) / len(parts)).backward()  # a mean of means is something else
    off = torch.cat([(p.grad - exact[n]).flatten() for n, p in model.named_parameters()])
    assert off.norm() > 0.1 * torch.cat([g.flatten() for g in exact.values()]).norm()


@pytest.mark.slow
def test_processes_share_the_targets_of_a_step(tmp_path):
    """Windows of one byte, of which those at the end of a document have no target: processes have unequal numbers."""
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(60):
            text = bytes(random.randint(97, 123, random.randint(1, 6)).tolist())
            (tmp_path / split / f"{i}.txt").write_bytes(text)
    common = ["model=transformer_tiny", "model.dim=32", "model.depth=1", "task=text", "task.sequence_length=1"]
    common += [f"task.path={tmp_path / 'train'}", f"task.val_path={tmp_path / 'val'}", "task.packed=true"]
    common += ["train.batch_size=10", "train.max_steps=3", "optimizer=sgd", "optimizer.lr=0.5", "train.clip_grad=null"]
    common += ["train.device=cpu", "tracker=null", "progress=false", "train.warmup=0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [str(PACKAGE / "train.py"), *common, f"output_dir={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run(compose_config([*common, f"output_dir={tmp_path / 'one'}"]), quiet=True)
    one, two = (tensors(next((tmp_path / name).glob("*/summary.json")).parent) for name in ("one", "two"))
    assert all((one[k] - two[k]).abs().max() < 1e-5 for k in one)


def test_the_training_loss_of_an_epoch_is_over_targets_too(tmp_path, monkeypatch):
    config = compose_config([*MASKED, "train.max_steps=3", f"output_dir={tmp_path}"])
    folder = cut(monkeypatch, config, 2)
    state = torch.load(folder / "checkpoints/last/state.pt", weights_only=True)
    assert state["loss_count"] > 2 * 32  # targets, not steps
    assert 0 < state["loss_sum"] / state["loss_count"] < 7

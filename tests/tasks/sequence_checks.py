"""What the tests of sequence tasks share."""

import numpy as np
import torch
from mixerzoo.tasks.sequence.sequence import IGNORE


def fetch(task, split, count=None, *, train=False, seed=0):
    index = torch.arange(task.size(split) if count is None else count)
    return task.fetch(split, index, train=train, generator=torch.Generator().manual_seed(seed))


def all_of(task, split):
    batch = fetch(task, split)
    return batch["input"].numpy(), batch["target"].numpy()


def check_generated(make):
    """Reproducible, from its own seed alone, another one per split, and without a global generator."""
    task = make(seed=3)
    np_state, torch_state = np.random.get_state(), torch.random.get_rng_state()
    task.open()
    assert all(np.array_equal(a, b) for a, b in zip(np_state, np.random.get_state(), strict=True))
    assert torch.equal(torch_state, torch.random.get_rng_state())
    np.random.seed(1)
    torch.manual_seed(1)
    again, other = make(seed=3), make(seed=4)
    again.open()
    other.open()
    assert task.fingerprint() == again.fingerprint() != other.fingerprint()
    rows = [all_of(task, split)[0] for split in ("train", "val", "test")]
    assert not np.array_equal(rows[1], rows[2])
    assert not np.array_equal(rows[0][: len(rows[1])], rows[1])
    for ids in rows:
        assert ids.min() >= 0
        assert ids.max() < task.vocab_size
        assert ids.shape[1] == task.sequence_length
    assert task.example(2)[0].shape == (2, task.sequence_length)
    # a batch is a matter of its index alone
    one, other = fetch(task, "train", 4, train=True, seed=0), fetch(task, "train", 4, train=True, seed=1)
    assert torch.equal(one["input"], other["input"])
    return task


def check_positions(task, split):
    """Loss and accuracy come from the positions with a target only: their logits alone have a gradient.

    Returns the batch.
    """
    batch = fetch(task, split, min(8, task.size(split)))
    counted = batch["target"] != IGNORE
    assert counted.any()
    right = torch.nn.functional.one_hot(batch["target"].clamp_min(0), task.vocab_size).float() * 30
    wrong = right.roll(1, -1)
    logits = torch.where(counted[..., None], right, wrong).requires_grad_()

    def model(ids, **kwargs):
        return logits

    loss = task.loss(model, batch)
    assert loss < 1e-3
    (gradient,) = torch.autograd.grad(task.loss(lambda ids, **kwargs: logits * 0.1, batch), logits)
    assert torch.equal(gradient.abs().sum(-1) > 0, counted)
    metrics = task.metrics()
    task.update(metrics, model, batch)
    assert task.compute(metrics)["accuracy"] == 1
    metrics = task.metrics()
    task.update(metrics, lambda ids, **kwargs: torch.where(counted[..., None], wrong, right), batch)
    assert task.compute(metrics)["accuracy"] == 0
    return batch

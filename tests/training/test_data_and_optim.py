"""Order and sharding of the data; groups and schedules of the optimizer."""

import math

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model
from mixerzoo.tasks import Task
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.config import TrainConfig
from mixerzoo.training.data import TrainingData, derive_seed, epoch_order, evaluation_batches
from mixerzoo.training.optim import build_optimizer, build_schedule, optimizer_options


class Numbers(Task):
    """Thirty samples, each its own number and a random one."""

    def size(self, split):
        return 30

    def fetch(self, split, index, *, train, generator):
        return {"input": index.float(), "target": torch.rand(len(index), generator=generator), "index": index}


def data(**options):
    defaults = {"seed": 0, "batch_size": 8, "accumulate": 2, "rank": 0, "world": 1, "workers": 0}
    return TrainingData(Numbers(), **(defaults | options), device=torch.device("cpu"))


def indices(steps):
    return [torch.cat([part["index"] for part in parts]).tolist() for parts in steps]


def test_an_epoch_shows_no_sample_twice_and_the_next_has_another_order():
    seen = indices(data().steps(0, 6))
    assert data().steps_per_epoch == 3
    for epoch in (seen[:3], seen[3:]):
        assert len({i for batch in epoch for i in batch}) == 24
    assert seen[:3] != seen[3:]
    assert indices(data(seed=1).steps(0, 3)) != seen[:3]
    assert torch.equal(epoch_order(30, 0, 4), epoch_order(30, 0, 4))


def test_starting_anywhere_gives_the_same_batches():
    whole = list(data().steps(0, 7))
    for start in (1, 3, 5):
        for ours, theirs in zip(data().steps(start, 7), whole[start:], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a["index"], b["index"])
                assert torch.equal(a["target"], b["target"])


def test_processes_share_the_batch_of_one():
    whole = indices(data(accumulate=1).steps(0, 4))
    shares = [indices(data(accumulate=1, rank=r, world=4).steps(0, 4)) for r in range(4)]
    for step, batch in enumerate(whole):
        assert [i for share in shares for i in share[step]] == batch
    assert all(len(parts) == 2 for parts in data(rank=1, world=2).steps(0, 1))


def test_evaluation_sees_every_sample_once():
    seen = []
    for rank in range(3):
        options = {"batch_size": 4, "rank": rank, "world": 3, "workers": 0, "device": torch.device("cpu")}
        for batch in evaluation_batches(Numbers(), "val", **options):
            seen += batch["index"].tolist()
    assert sorted(seen) == list(range(30))


def test_batches_that_cannot_be():
    with pytest.raises(ConfigError, match="more than the 30"):
        data(batch_size=31)
    with pytest.raises(ConfigError, match="3 processes"):
        data(world=3)


def test_seeds_tell_purposes_apart():
    assert derive_seed(0, "a") != derive_seed(0, "b") != derive_seed(1, "b")
    assert len({derive_seed(0, "step", i) for i in range(1000)}) == 1000


def test_what_a_model_names_takes_no_weight_decay():
    model = create_model("metaformer_digits", mixer="mamba", num_classes=10, in_chans=1, image_size=[8, 8])
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1})
    free = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.1 for p in g["params"]}
    assert free | decayed == set(names.values())
    assert free >= model.no_weight_decay() | {n for n, p in model.named_parameters() if p.ndim <= 1}
    matrices_without = {n for n in free if dict(model.named_parameters())[n].ndim > 1}
    assert any(n.endswith("A_log") for n in matrices_without)
    assert any(n.endswith("fc.weight") for n in decayed)


def test_layer_decay():
    model = create_model("metaformer_digits")
    optimizer = build_optimizer(model, {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "layer_decay": 0.5})
    assert len({g["lr_scale"] for g in optimizer.param_groups}) > 2


def test_options_of_optimizers():
    assert optimizer_options("sgd")["nesterov"] is True
    model = torch.nn.Linear(2, 2)
    built = build_optimizer(model, {"name": "lion", "lr": 1e-4, "betas": [0.8, 0.9]})
    assert built.param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(ConfigError, match=r'optimizer\.momentum: the optimizer "adamw" has no such option'):
        build_optimizer(model, {"name": "adamw", "lr": 1e-4, "momentum": 0.9})
    with pytest.raises(ConfigError, match=r"optimizer\.lr: missing"):
        build_optimizer(model, {"name": "adamw"})


def rates(schedule, **options):
    from dataclasses import asdict

    train = TrainConfig(**(asdict(compose_config().train) | {"schedule": schedule} | options))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_schedule(optimizer, train, 100)
    found = []
    for step in range(101):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules():
    cosine = rates("cosine", warmup=0.1, min_lr=0.05)
    assert cosine[0] == pytest.approx(0.2)  # the first step is a step
    assert cosine[5] == pytest.approx(1.1)
    assert cosine[50] == pytest.approx(0.1 + 1.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert cosine[100] == pytest.approx(0.1)
    linear = rates("linear", warmup=0.0, min_lr=0.0)
    assert linear[0] == 2.0
    assert linear[25] == pytest.approx(1.5)
    assert linear[75] == pytest.approx(0.5)
    constant = rates("constant", warmup=0.2)
    assert set(constant[20:]) == {2.0}
    assert constant[10] < 2.0

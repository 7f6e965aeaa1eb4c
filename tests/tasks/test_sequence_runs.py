"""Sequence tasks meet models through the configuration of a run."""

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.run import make_model, make_task

SMALL = ("task.num_train=8", "task.num_eval=4")
TINY = ("model.dim=32", "model.depth=1")


def built(*overrides):
    config = compose_config(list(overrides))
    task = make_task(config)
    task.open()
    return task, make_model(config, task)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=transformer_tiny", "task=mqar_small", *SMALL),
        ("model=mamba2_tiny", "task=mad_compression", *SMALL),
        ("model=transformer_tiny", "model.causal=false", "task=listops_short", *SMALL),
        ("model=mamba_tiny", "task=pixels_digits"),
        ("model=fnet_tiny", "task=python_text", "task.objective=masked_lm", "task.sequence_length=64"),
        ("model=transformer_tiny", "task=python_text", "task.packed=true", "task.sequence_length=64"),
    ],
)
def test_the_task_sets_objective_and_sizes_of_the_model(overrides):
    task, model = built(*overrides, *TINY)
    assert model.config.objective == task.objective
    assert model.config.vocab_size == task.vocab_size
    batch = task.fetch("train", torch.arange(2), train=True, generator=torch.Generator().manual_seed(0))
    loss = task.loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert model.embedding.weight.grad.abs().sum() > 0
    metrics = task.metrics()
    with torch.no_grad():
        model.eval()(*task.example(1))
        task.update(metrics, model, task.fetch("val", torch.arange(2), train=False, generator=torch.Generator()))
    assert task.metric in task.compute(metrics)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task=mqar_small", *SMALL), r'the task "mqar" gives tokens, which the backbone "pyramid" does not take'),
        (("model=mamba2_tiny", "task=digits"), r'"digits" gives images, which the backbone "language" does not take'),
        (("model=fnet_tiny", "task=mqar_small", *SMALL), r"model\.objective: causal_lm needs causal=true"),
        (("model=mamba2_tiny", "task=mqar_small", "model.objective=classify", *SMALL), r"model\.objective: classify"),
        (("model=mamba2_tiny", "task=mqar_small", "model.vocab_size=9", *SMALL), r"model\.vocab_size: 9 disagrees"),
        (("model=mamba2_tiny", "task=text"), r"task\.path: needed"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        built(*overrides)

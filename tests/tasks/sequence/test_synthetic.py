"""Associative recall, selective copying, induction heads: what they are, and that they are it on every seed."""

import numpy as np
import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task
from mixerzoo.tasks.sequence.sequence import IGNORE, RandomState, distinct, weighted
from mixerzoo.tests.tasks.sequence_checks import all_of, check_generated, check_positions
from mixerzoo.tests.utils import load_golden


def mqar_task(**options):
    defaults = {"vocab_size": 64, "sequence_length": 32, "num_kv_pairs": 4, "num_train": 300, "num_eval": 100}
    return create_task("mqar", **{**defaults, **options})


def check_mqar(ids, target, *, vocab_size, pairs, filler_is_zero):
    for row, wanted in zip(ids, target, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < vocab_size // 2 <= values.min()
        assert values.max() < vocab_size
        (asked,) = np.nonzero(wanted != IGNORE)
        assert len(asked) == pairs
        assert asked.min() >= 2 * pairs
        assert (asked % 2 == 0).all()
        meaning = dict(zip(keys, values, strict=True))
        assert sorted(row[asked]) == sorted(keys)  # every key once
        assert [meaning[k] for k in row[asked]] == wanted[asked].tolist()
        if filler_is_zero:
            rest = np.delete(row[2 * pairs :], asked - 2 * pairs)
            assert not rest.any()


@pytest.mark.parametrize(("random", "suffix"), [(True, ""), (False, "_zeros")])
def test_mqar_is_the_published_one_bit_by_bit(random, suffix):
    golden = load_golden("mqar_data")
    given = golden.kwargs
    task = create_task(
        "mqar",
        vocab_size=given["vocab_size"],
        sequence_length=given["input_seq_len"],
        num_kv_pairs=given["num_kv_pairs"],
        power_a=given["power_a"],
        random_non_queries=random,
        stream="zoology",
        num_train=given["num_examples"],
        num_eval=1,
        seed=given["seed"],
    )
    task.open()
    ids, target = all_of(task, "train")
    assert np.array_equal(ids, golden[f"output.inputs{suffix}"].numpy())
    assert np.array_equal(target, golden[f"output.labels{suffix}"].numpy())
    check_mqar(ids, target, vocab_size=given["vocab_size"], pairs=given["num_kv_pairs"], filler_is_zero=not random)


@pytest.mark.parametrize("random", [True, False])
def test_mqar_vectorised_is_the_same_task(random):
    task = check_generated(lambda seed: mqar_task(seed=seed, random_non_queries=random))
    for split in task.splits():
        check_mqar(*all_of(task, split), vocab_size=64, pairs=4, filler_is_zero=not random)
    ids, target = all_of(task, "train")
    if random:  # filler is any id, a key's too
        assert len(np.unique(ids[:, 8:][target[:, 8:] == IGNORE])) == 64
    check_positions(task, "train")
    assert task.model_kwargs() == {"vocab_size": 64, "sequence_length": 32, "objective": "causal_lm"}


def test_both_streams_of_mqar_have_the_same_distribution():
    many = {"num_train": 4000, "num_eval": 1, "power_a": 0.01, "random_non_queries": False}
    shares = []
    for stream in ("vectorised", "zoology"):
        task = mqar_task(stream=stream, **many)
        task.open()
        ids, target = all_of(task, "train")
        shares.append(((target != IGNORE).mean(0), np.bincount(ids[:, 0], minlength=64) / len(ids)))
    # binomial deviation 0.5 / sqrt(4000) = 0.008, of a difference 0.011
    assert np.abs(shares[0][0] - shares[1][0]).max() < 0.05
    assert shares[0][0][8] > 2 * shares[0][0][20] > 0  # early offsets are favoured
    assert np.abs(shares[0][1] - shares[1][1]).max() < 0.025


def test_no_power_favours_no_offset():
    task = mqar_task(power_a=1.0, num_train=4000, num_eval=1)
    task.open()
    share = (all_of(task, "train")[1] != IGNORE).mean(0)[8::2]
    assert np.abs(share - 4 / 12).max() < 0.04


def test_distinct_and_weighted_draws():
    rng = RandomState(0)
    drawn = distinct(rng, 6000, 3, 4)
    assert all(len(set(row)) == 3 for row in drawn)
    orders = np.unique(drawn @ [16, 4, 1], return_counts=True)[1]
    assert len(orders) == 24  # every order of every set, 250 each on average
    assert orders.min() > 180
    assert orders.max() < 320
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    drawn = weighted(rng, 20_000, 2, weights)
    first = np.bincount(drawn[:, 0], minlength=4) / 20_000
    assert np.abs(first - weights / 8).max() < 0.015
    after = drawn[drawn[:, 0] == 0, 1]
    assert np.abs(np.bincount(after, minlength=4) / len(after) - [0, 0.5, 0.25, 0.25]).max() < 0.02


def test_selective_copying():
    task = check_generated(
        lambda seed: create_task(
            "selective_copying", sequence_length=20, num_tokens=5, num_train=200, num_eval=50, seed=seed
        )
    )
    for split in task.splits():
        for row, wanted in zip(*all_of(task, split), strict=True):
            data = row[:15][row[:15] > 0]
            assert len(data) == 5
            assert data.max() < 15
            assert (row[15:] == 15).all()
            assert (wanted[:15] == IGNORE).all()
            assert np.array_equal(wanted[15:], data)
    check_positions(task, "test")


def test_induction_heads():
    task = check_generated(
        lambda seed: create_task("induction_heads", sequence_length=12, num_train=400, num_eval=50, seed=seed)
    )
    ids, target = all_of(task, "train")
    special = ids == 15
    assert (special.sum(1) == 2).all()
    assert special[:, -1].all()
    place = special.argmax(1)
    assert set(place) == set(range(10))  # what follows it stands before the last position
    assert (target[:, :-1] == IGNORE).all()
    assert np.array_equal(target[:, -1], ids[np.arange(400), place + 1])
    assert target[:, -1].max() < 15
    check_positions(task, "val")


def test_induction_heads_at_another_length():
    task = create_task("induction_heads", sequence_length=8, eval_length=20, num_train=4, num_eval=4)
    task.open()
    assert all_of(task, "train")[0].shape == (4, 8)
    assert all_of(task, "test")[0].shape == (4, 20)
    assert task.model_kwargs()["sequence_length"] == 20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mqar", {"sequence_length": 33}, r"task\.sequence_length: 33 is odd"),
        ("mqar", {"sequence_length": 14}, r"task\.sequence_length: 14 is too small; at least 16 .* 4 pairs"),
        ("mqar", {"vocab_size": 32}, r"task\.vocab_size: 32 is too small; at least 33 .*task\.sequence_length=32"),
        ("mqar", {"power_a": 0.0}, r"task\.power_a: 0\.0 must be above 0"),
        ("mqar", {"num_kv_pairs": 0}, r"task\.num_kv_pairs: 0 must be at least 1"),
        ("mqar", {"stream": "zoo"}, r"task\.stream: 'zoo'"),
        ("mqar", {"num_train": 0}, r"task\.num_train: 0"),
        ("mqar", {"seed": -1}, r"task\.seed: -1"),
        ("mqar", {"vocab": 3}, r'task\.vocab: .* Did you mean "vocab_size"'),
        ("selective_copying", {"vocab_size": 3}, r"task\.vocab_size: 3 .*at least 4"),
        ("selective_copying", {"sequence_length": 31}, r"task\.sequence_length: 31 .*at least 32"),
        ("selective_copying", {"num_tokens": 0}, r"task\.num_tokens: 0"),
        ("induction_heads", {"vocab_size": 2}, r"task\.vocab_size: 2"),
        ("induction_heads", {"sequence_length": 2}, r"task\.sequence_length: 2"),
        ("induction_heads", {"eval_length": 1}, r"task\.eval_length: 1"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        mqar_task(**options) if name == "mqar" else create_task(name, **options)


def test_smallest_settings_work():
    for name, options in (
        ("mqar", {"vocab_size": 10, "sequence_length": 4, "num_kv_pairs": 1}),
        ("mqar", {"vocab_size": 17, "sequence_length": 16, "num_kv_pairs": 4, "stream": "zoology"}),
        ("selective_copying", {"vocab_size": 4, "sequence_length": 2, "num_tokens": 1}),
        ("induction_heads", {"vocab_size": 3, "sequence_length": 3}),
    ):
        task = create_task(name, num_train=5, num_eval=5, **options)
        task.open()
        assert torch.isfinite(task.loss(lambda ids, v=task.vocab_size: torch.zeros(*ids.shape, v), fetch_all(task)))


def fetch_all(task):
    return task.fetch("train", torch.arange(5), train=True, generator=torch.Generator())

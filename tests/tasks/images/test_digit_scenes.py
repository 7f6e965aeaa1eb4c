"""Scenes of digits: what is drawn, what is asked, and what simple answers are worth."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task
from mixerzoo.tasks.images.digit_scenes import digit_images, draw

NAMES = ("change_digits", "moving_digits", "moving_digits_middle")
PINNED = {"change_digits": "de77ddfe4a2d", "moving_digits": "d3a76501ab29", "moving_digits_middle": "51280160aea7"}


def opened(name, **options):
    task = create_task(name, num_train=300, num_eval=60, **options)
    task.open()
    return task


def fetch(task, split="train", count=60, start=0):
    generator = torch.Generator().manual_seed(start)
    return task.fetch(split, torch.arange(start, start + count), train=True, generator=generator)


def test_splits_hold_different_digits():
    rows = [digit_images(split).flatten(1).unique(dim=0) for split in ("train", "val", "test")]
    assert torch.cat(rows).unique(dim=0).shape[0] == sum(map(len, rows)) == 1797


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_is_a_function_of_its_number(name):
    task, again = opened(name), opened(name)
    assert task.fingerprint() == again.fingerprint()
    assert task.fingerprint().startswith(PINNED[name])
    one, other = fetch(task, count=8, start=4), fetch(again, count=2, start=6)
    for key in ("input", "target", "index"):
        assert torch.equal(one[key][2:4], other[key])
    assert not torch.equal(fetch(task, "val", 8, 4)["input"], one["input"])
    assert one["input"].shape[1:] == task.example(8)[0].shape[1:]
    assert task.model_kwargs()["frames"] == one["input"].shape[2]


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_added_to_the_input_alone(name):
    quiet, loud = (fetch(opened(name, noise=n), "test") for n in (0.0, 0.5))
    assert torch.equal(quiet["target"], loud["target"])
    assert (loud["input"] - quiet["input"]).std() == pytest.approx(0.5, rel=0.02)
    assert quiet["input"].amin() == 0
    assert quiet["input"].amax() <= 1


def test_draw_by_hand():
    digits, places = torch.rand(2, 3, 2, 8, 8), torch.randint(0, 5, (2, 3, 2, 2))
    expected = torch.zeros(2, 2, 12, 12)
    for b in range(2):
        for d in range(3):
            for t in range(2):
                i, j = places[b, d, t].tolist()
                view = expected[b, t, i : i + 8, j : j + 8]
                view.copy_(torch.maximum(view, digits[b, d, t]))
    assert torch.equal(draw(digits, places, 12), expected)


def test_changes():
    task = opened("change_digits", noise=0.0, shift=0, num_digits=4)
    batch, kind = fetch(task), task.scenes["train"]["kind"][:60]
    assert set(kind.flatten().tolist()) == {0, 1, 2, 3}
    assert (kind == 1).sum(1).max() == 1
    before, after = batch["input"][:, 0].unbind(1)
    target = batch["target"]
    assert not ((before != after) & ~target).logical_and((before - after).abs() > 0.25).any()
    assert not target[(kind == 0).all(1)].any()
    assert (target & (torch.maximum(before, after) <= 0.25)).sum() == 0  # pixels of ink alone
    # ink that stays where it is counts, too, when another digit takes the place
    assert (target & (before == after)).any()
    removed = (kind == 2).all(1)
    shown = (kind != 2).sum(1)
    assert (after.flatten(1).amax(1) > 0)[~removed].all() or not removed.any()
    assert shown.min() < 4


def test_the_second_image_is_displaced():
    task = opened("change_digits", noise=0.0, shift=2, change=0.01, num_digits=3)
    scenes, batch = task.scenes["train"], fetch(task)
    still = (scenes["kind"][:60] == 0).all(1)
    for number in still.nonzero()[:, 0].tolist():
        a, b = batch["input"][number, 0]
        down, right = scenes["shift"][number].tolist()
        assert torch.equal(a.roll((down, right), (0, 1)), b)
    assert still.sum() > 40
    assert not batch["target"][still].any()
    assert scenes["shift"].unique().tolist() == [-2, -1, 0, 1, 2]


def test_motions():
    task = opened("moving_digits", noise=0.0, num_digits=1)
    batch, places = fetch(task, count=300), task.scenes["train"]["places"]
    assert places.min() >= 0
    assert places.max() <= 24 - 8
    assert batch["target"].bincount(minlength=7).min() > 25
    step = places[:, 0].diff(dim=1)
    for name, row, column in (("still", 0, 0), ("right", 0, 1), ("left", 0, -1), ("down", 1, 0), ("up", -1, 0)):
        of = step[batch["target"] == task.classes.index(name)]
        assert (of.sign() == torch.tensor([row, column])).all(), name
        assert (of == of[:, :1]).all()
    for name, sign in (("clockwise", 1), ("anticlockwise", -1)):
        of = (places[batch["target"] == task.classes.index(name), 0] - 8).float()  # from the middle
        y, x = of.unbind(-1)
        turned = x[:, :-1] * y[:, 1:] - y[:, :-1] * x[:, 1:]  # rows grow downwards
        assert (turned.sum(1).sign() == sign).all(), name
    first = {tuple(p.tolist()) for p in places[:, 0, 0]}
    assert len(first) > 60


def test_the_middle_is_in_the_middle():
    task = opened("moving_digits_middle", num_digits=1)
    places = task.scenes["val"]["places"]
    straight = (places[:, :, 0] + places[:, :, 2] == 2 * places[:, :, 1]).all(-1).all(-1)
    assert straight.sum() > 30
    assert (places[:, :, 0] != places[:, :, 1]).any(-1).float().mean() > 0.9  # what rests would ask nothing
    batch = fetch(task, "val", 60)
    digit = digit_images("val")[task.scenes["val"]["digit"][:, 0]]
    for number in range(60):
        i, j = places[number, 0, 1].tolist()
        assert torch.equal(batch["target"][number, i : i + 8, j : j + 8], digit[number])


def figures(task, model, split="test"):
    metrics = task.metrics()
    for start in (0, 30):
        task.update(metrics, model, fetch(task, split, 30, start))
    return task.compute(metrics)


def test_metrics_of_maps():
    task = opened("change_digits")
    whole = fetch(task, "test", 60)
    everything = figures(task, lambda x: torch.ones_like(x[:, :, 0]))
    rate = whole["target"].float().mean().item()
    assert everything["iou"] == pytest.approx(rate, abs=1e-5)
    assert everything["f1"] == pytest.approx(2 * rate / (1 + rate), abs=1e-5)
    asked = iter([whole["target"][:30], whole["target"][30:]])
    assert figures(task, lambda x: 20 * next(asked)[:, None].float() - 10)["iou"] == 1

    task = opened("moving_digits_middle")
    whole = fetch(task, "test", 60)
    error = (whole["input"].mean((1, 2)) - whole["target"]).square().mean((1, 2))
    mean = figures(task, lambda x: x.mean(2))
    assert mean["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert mean["psnr"] == mean["mean"]
    assert figures(task, lambda x: x[:, :, 0])["psnr"] < mean["psnr"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("change_digits", {"num_digits": 9}, "num_digits"),
        ("change_digits", {"change": 1.0}, "change"),
        ("change_digits", {"shift": -1}, "shift"),
        ("change_digits", {"canvas": 8}, "canvas"),
        ("moving_digits", {"canvas": 16}, "canvas"),
        ("moving_digits", {"frames": 1}, "frames"),
        ("moving_digits", {"noise": -1.0}, "noise"),
        ("moving_digits_middle", {"speed": 0}, "speed"),
        ("moving_digits_middle", {"num_train": 0}, "num_train"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ConfigError, match=f"task.{message}"):
        create_task(name, **options)


def test_a_model_without_a_map_is_refused():
    task = opened("change_digits")
    with pytest.raises(ConfigError, match="head=upsample"):
        task.loss(lambda x: x.new_zeros(x.shape[0], 1), fetch(task))

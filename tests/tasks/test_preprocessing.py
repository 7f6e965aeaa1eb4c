"""What a model was evaluated on is what a stored preprocessing makes of the raw sample, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixerzoo import ConfigError
from mixerzoo.tasks import Task, create_task, preprocessing_of
from mixerzoo.tasks.images.digit_scenes import digit_images
from mixerzoo.tasks.sequence.lra import LISTOPS_SYMBOLS
from PIL import Image

NUMBERS = [3, 0, 5]


def images(task: Any) -> list[Any]:
    return [task.load()["val"][0][i] for i in NUMBERS]


def scenes(task: Any) -> list[Any]:
    described = {key: value[NUMBERS] for key, value in task.scenes["val"].items()}
    return list(task.render(described, digit_images("val"))[0])


def texts(task: Any) -> list[Any]:
    return [task._data["val"][i][0] for i in NUMBERS]


def windows(task: Any) -> list[Any]:
    length = task.sequence_length
    return [bytes(task.stream("val")[i * length : (i + 1) * length]) for i in NUMBERS]


def expressions(task: Any) -> list[Any]:
    rows = [task._sequences[i + task.num_train] for i in NUMBERS]
    return [" ".join(LISTOPS_SYMBOLS[i] for i in row) for row in rows]


def paths(task: Any) -> list[Any]:
    reader, _ = task._readers["val"]
    return [reader.filename(i, absolute=True) for i in NUMBERS]


LISTOPS = {"min_length": 4, "max_length": 30, "max_depth": 4, "max_args": 3, "num_train": 20, "num_eval": 10}
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], list[Any]]]] = {
    "digits": ("digits", {}, images),
    "digits resized": ("digits", {"image_size": 12}, images),
    "folder": ("imagefolder", {"root": "images", "image_size": 32}, paths),
    "clips": ("moving_digits", {"noise": 0.0, "num_train": 8, "num_eval": 8}, scenes),
    "pairs": ("change_digits", {"noise": 0.0, "num_train": 8, "num_eval": 8}, scenes),
    "text": ("text", {"path": "book.txt", "sequence_length": 64}, windows),
    "masked text": ("text_folder", {"root": "texts", "max_bytes": 40}, texts),
    "padded text": ("text_folder", {"root": "texts", "max_bytes": 40, "use_mask": False}, texts),
    "listops": ("listops", LISTOPS, expressions),
    "pixels": ("pixels", {"levels": 16}, lambda task: images(task._source)),
    "ids": ("mqar", {"num_train": 8, "num_eval": 8}, lambda task: [task._data["val"][0][i] for i in NUMBERS]),
}


def opened(name: str, options: dict[str, Any]) -> Task:
    rng = np.random.RandomState(0)
    for split, count in (("train", 3), ("val", 3)):
        for label in ("cat", "dog"):
            folder = Path("images") / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(rng.randint(0, 256, (40 + i, 50, 3), np.uint8)).save(folder / f"{i}.png")
            folder = Path("texts") / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (folder / f"{i}.txt").write_text(f"{label} " * (3 + 4 * i))
    Path("book.txt").write_text("In the beginning was the word. " * 400)
    task = create_task(name, **options)
    task.open()
    return task


@pytest.mark.parametrize("case", CASES)
def test_a_raw_sample_becomes_what_was_evaluated(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, options, raw = CASES[case]
    task = opened(name, options)
    own = task.preprocessing()
    assert own is not None
    stored = preprocessing_of(json.loads(json.dumps(own.describe())))
    assert stored == own
    assert stored is not None
    batch = task.fetch("val", torch.tensor(NUMBERS), train=False, generator=torch.Generator())
    inputs, more = stored.batch(raw(task))
    assert torch.equal(inputs, batch["input"])
    assert more.keys() == batch.keys() & {"mask"}
    assert all(torch.equal(more[key], batch[key]) for key in more)
    one = stored(raw(task)[0])
    real = batch["mask"][0] if "mask" in batch else slice(None)
    assert torch.equal(one, batch["input"][0][real] if "mask" in batch else batch["input"][0])


def test_images_in_every_form_are_the_same(tmp_path: Path) -> None:
    task = create_task("digits")
    task.open()
    prepare = task.preprocessing()
    assert prepare is not None
    array = images(task)[0]
    Image.fromarray(array).save(tmp_path / "x.png")
    colour = np.stack([array] * 3, -1)
    expected = prepare(array)
    assert expected.std() > 0.5  # normalised, not left as bytes
    for form in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(array), torch.from_numpy(array), colour):
        assert torch.equal(prepare(form), expected)


def test_text_comes_back() -> None:
    prepare = preprocessing_of({"kind": "bytes", "vocab_size": 257, "length": None, "masked": True, "padding": 0})
    assert prepare is not None
    ids = prepare("für alle")
    assert ids.tolist()[:3] == [102, 0xC3, 0xBC]
    assert prepare.decode(ids) == "für alle"
    assert prepare.decode([104, 256, 105]) == "hi"  # the id of masked tokens is no byte
    words = preprocessing_of({"kind": "symbols", "vocab_size": 3, "symbols": ["", "a", "b"]})
    assert words is not None
    assert words("b a b").tolist() == [2, 1, 2]
    assert words.decode([2, 1, 0, 0]) == "b a"


@pytest.mark.parametrize(
    ("described", "sample", "said"),
    [
        ({"kind": "bytes", "vocab_size": 256}, 3, "int is neither str nor bytes"),
        ({"kind": "bytes", "vocab_size": 256}, "", "an empty sequence"),
        ({"kind": "ids", "vocab_size": 4}, [1, 4], r"1 to 4 are not all in \[0, 4\)"),
        ({"kind": "ids", "vocab_size": 4}, [0.5], "a sequence of whole numbers"),
        ({"kind": "symbols", "vocab_size": 2, "symbols": ["", "a"]}, "a c", '"c" is not a symbol. Allowed: a'),
        ({"kind": "clip", "frames": 2, "canvas": 4}, np.zeros((2, 4, 5)), r"\(2, 4, 5\) is not \(2, 4, 4\)"),
        ({"kind": "normalised", "mean": [0.0], "std": [1.0], "image_size": [4, 4]}, "no.png", "cannot be read as an"),
        ({"kind": "normalised", "mean": [0.0], "std": [1.0], "image_size": [4, 4]}, np.zeros((4, 4)), "of uint8"),
        ({"kind": "pixels", "vocab_size": 4, "image_size": [4, 4]}, np.zeros((4, 5), np.uint8), "height, width"),
        ({"kind": "bites"}, "", 'Did you mean "bytes"'),
    ],
)
def test_what_cannot_be_prepared_is_said(described: dict[str, Any], sample: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preprocessing_of(described)(sample)  # type: ignore[misc]

"""Classification of sequences: ListOps, pixels, texts by their bytes."""

import shutil
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model
from mixerzoo.tasks import create_task
from mixerzoo.tasks.sequence.lra import END, LISTOPS_SYMBOLS, listops
from mixerzoo.tasks.sequence.sequence import RandomState
from mixerzoo.tasks.text.corpora import king_james, split_of
from mixerzoo.tests.tasks.sequence_checks import fetch

SHORT = {"min_length": 4, "max_length": 40, "max_depth": 4, "max_args": 5, "num_train": 300, "num_eval": 60}


def opened(name, **options):
    task = create_task(name, **options)
    task.open()
    return task


def median(values):
    return int(np.median(values))


OPERATORS = {"[MIN": min, "[MAX": max, "[MED": median, "[SM": lambda values: sum(values) % 10}


def evaluate(tokens):
    """Value, depth and argument counts of an expression; fails on one that is not whole."""
    stack, depth, counts, result = [], 1, [], None
    for number, symbol in enumerate(LISTOPS_SYMBOLS[t] for t in tokens):
        assert result is None, "something follows the end"
        if symbol in OPERATORS:
            stack.append((symbol, []))
            depth = max(depth, len(stack) + 1)
            continue
        if symbol == "]":
            operator, values = stack.pop()
            counts.append(len(values))
            value = OPERATORS[operator](values)
        else:
            value = int(symbol)
        if stack:
            stack[-1][1].append(value)
        else:
            result = value
            assert number == len(tokens) - 1
    assert result is not None
    return result, depth, counts


def test_expressions_have_the_values_they_say():
    task = opened("listops", **SHORT)
    depths, counts = Counter(), Counter()
    for split in task.splits():
        batch = fetch(task, split)
        for ids, real, value in zip(batch["input"], batch["mask"], batch["target"].tolist(), strict=True):
            tokens = ids[real].tolist()
            assert not ids[~real].any()
            found, depth, arguments = evaluate(tokens)
            assert found == value
            assert 4 < len(tokens) < 40
            depths[depth] += 1
            counts.update(arguments)
    assert max(depths) == 4
    assert set(counts) == {2, 3, 4, 5}
    symbols = Counter(t for row in task._sequences for t in row.tolist())
    assert set(symbols) == set(range(1, 16))  # all digits, operators and the bracket
    assert symbols[END] == sum(symbols[t] for t in range(11, 15))


def test_published_lengths():
    sequences, values = listops(RandomState(0), 4000, min_length=500, max_length=2000, max_depth=10, max_args=10)
    assert len(sequences) == len(values) > 100
    lengths = [len(s) for s in sequences]
    assert min(lengths) > 500
    assert max(lengths) < 2000
    for tokens, value in zip(sequences[:40], values[:40].tolist(), strict=True):
        found, depth, arguments = evaluate(tokens.tolist())
        assert found == value
        assert depth <= 10
        assert max(arguments) <= 10
    task = create_task("listops")
    assert (task.size("train"), task.size("val"), task.size("test")) == (96_000, 2_000, 2_000)


def test_shares_of_the_grammar():
    everything, _ = listops(RandomState(1), 30_000, min_length=0, max_length=10**6, max_depth=2, max_args=3)
    assert len(everything) == 30_000
    single = [s for s in everything if len(s) == 1]
    assert abs(len(single) / 30_000 - 0.75) < 0.012  # a node is an operator with probability 1/4
    assert abs(np.mean([len(s) == 4 for s in everything]) - 0.125) < 0.01  # two arguments in half of the cases
    first = np.bincount([s[0] for s in everything if len(s) > 1], minlength=15)[11:]
    assert np.abs(first / first.sum() - 0.25).max() < 0.03


def test_listops_is_reproducible_and_has_no_expression_twice():
    np_state, torch_state = np.random.get_state(), torch.random.get_rng_state()
    one, again, other = (opened("listops", **SHORT, seed=s) for s in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(np_state, np.random.get_state(), strict=True))
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    rows = [bytes(row) for row in one._sequences]
    assert len(set(rows)) == len(rows) == 420


def test_padding_with_and_without_a_mask():
    masked, plain = opened("listops", **SHORT), opened("listops", **SHORT, use_mask=False)
    batch, full = fetch(masked, "val", 5), fetch(plain, "val", 5)
    assert batch["input"].shape[1] == batch["mask"].sum(1).max() < 39
    assert full["input"].shape[1] == plain.sequence_length == 39
    assert "mask" not in full
    longest = batch["input"].shape[1]
    assert torch.equal(full["input"][:, :longest], batch["input"])
    assert not full["input"][:, longest:].any()
    # the mask reaches the model: what is behind the last token does not matter
    model = create_model("transformer_tiny", dim=32, depth=1, causal=False, **masked.model_kwargs()).eval()
    changed = {**batch, "input": torch.where(batch["mask"], batch["input"], 7)}
    assert torch.allclose(masked.run(model, batch), masked.run(model, changed), atol=1e-5)


def test_loss_and_accuracy_are_taken_once_per_sequence():
    task = opened("listops", **SHORT)
    assert task.model_kwargs() == {
        "vocab_size": 16,
        "sequence_length": 39,
        "objective": "classify",
        "num_classes": 10,
    }
    batch = fetch(task, "val", 8)
    logits = torch.nn.functional.one_hot(batch["target"], 10).float() * 20
    logits[0] = logits[0].roll(1)
    metrics = task.metrics()
    task.update(metrics, lambda ids, mask: logits, batch)
    figures = task.compute(metrics)
    assert figures["accuracy"] == 7 / 8
    assert figures["loss"] == pytest.approx(20 / 8, abs=1e-3)
    assert task.loss(lambda ids, mask: logits, batch).item() == pytest.approx(figures["loss"])
    assert task.count(batch) == batch["input"].numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 5}, r"task\.max_length: 5 is too small; at least 6"),
        ({"max_args": 1}, r"task\.max_args: 1"),
        ({"max_depth": 0}, r"task\.max_depth: 0"),
        ({"min_length": -1}, r"task\.min_length: -1"),
        ({"num_train": 0}, r"task\.num_train: 0"),
        ({"seed": 2**32}, r"task\.seed: 4294967296"),
        ({"max_depth": 1}, r"only 0 of 420 different expressions were found with min_length=4"),
        ({"min_length": 0, "max_depth": 1}, r"only 10 of 420 different expressions"),
    ],
)
def test_bad_listops_are_named(options, message, monkeypatch):
    from mixerzoo.tasks.sequence import lra

    monkeypatch.setattr(lra, "_BATCH_OF_TREES", 500)
    with pytest.raises(ConfigError, match=message):
        opened("listops", **{**SHORT, **options})


# -- pixels


def test_digits_as_sequences_of_pixels():
    task = opened("pixels")
    images = opened("digits")
    assert [task.size(s) for s in task.splits()] == [1257, 180, 360]
    batch, picture = fetch(task, "test"), fetch(images, "test")
    assert batch["input"].shape == (360, 64)
    assert torch.equal(batch["target"], picture["target"])
    prepared = images.preprocessing()
    grey = picture["input"] * prepared.std[0] + prepared.mean[0]
    assert torch.equal(batch["input"].reshape(360, 1, 8, 8), grey.round().long())  # left to right, top to bottom
    few = opened("pixels", levels=4)
    assert torch.equal(fetch(few, "test")["input"], batch["input"] // 64)
    assert task.fingerprint() != few.fingerprint()
    kwargs = few.model_kwargs()
    assert kwargs == {"vocab_size": 4, "sequence_length": 64, "objective": "classify", "num_classes": 10}
    model = create_model("mamba2_tiny", **{"dim": 32, "depth": 1, "mixer.head_dim": 32, **kwargs})
    assert torch.isfinite(few.loss(model, fetch(few, "train", 4)))


def test_colour_becomes_grey(monkeypatch):
    from mixerzoo.tasks.images.memory import Cifar10

    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8).reshape(1, 2, 2, 3)

    def load(self):
        self.classes = ["a"]
        return {"train": (colours, np.zeros(1)), "val": (colours, np.zeros(1)), "test": (colours, np.zeros(1))}

    monkeypatch.setattr(Cifar10, "load", load)
    assert fetch(opened("pixels", images="cifar10"), "val")["input"].tolist() == [[76, 150, 29, 255]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "digit"}, r'task\.images: "digit" is not known\. Did you mean "digits"'),
        ({"images": "mqar"}, r'task\.images: "mqar" is not known.* Allowed: .*digits'),
        ({"levels": 1}, r"task\.levels: 1 must be at least 2"),
        ({"images": "digits", "root": "x"}, r"task\.root: .*no such option"),
    ],
)
def test_bad_pixels_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        create_task("pixels", **options)


# -- bytes


def test_sections_of_the_king_james_bible():
    if shutil.which("bible") is None:
        pytest.skip("Debian's package bible-kjv is not installed")
    task = opened("kjv_sections", max_bytes=300)
    assert len(task.classes) == 8
    chapters = {d.name: d for d in king_james()}
    for name, section in (("Ge1", 0), ("Deu34", 0), ("Ruth1", 1), ("Psa23", 2), ("Dan1", 3), ("Mal4", 4), ("Acts1", 5)):
        rows = [text for text, label in task._data[split_of(name)] if label == section]
        assert chapters[name].content.splitlines()[0] in b"\n".join(rows)
    last = [text for text, label in task._data[split_of("Rev22")] if label == 7]
    assert chapters["Rev22"].content.splitlines()[-1] in b"\n".join(last)
    assert max(len(text) for s in task.splits() for text, _ in task._data[s]) <= 300
    batch = fetch(task, "val", 6)
    assert bytes(batch["input"][0][batch["mask"][0]].tolist()) == task._data["val"][0][0]


def write_classes(folder, count=1):
    for name in ("bad", "good"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.txt").write_text(f"{folder.name} {name} {i} " + "x" * 50)


def test_folders_of_texts(tmp_path):
    write_classes(tmp_path / "a" / "train", 3)
    write_classes(tmp_path / "a" / "val", 2)
    task = opened("text_folder", root=str(tmp_path / "a"), max_bytes=20)
    assert task.splits() == ("train", "val")
    assert task.classes == ["bad", "good"]
    assert [task.size(s) for s in task.splits()] == [6, 4]
    batch = fetch(task, "val")
    assert batch["target"].tolist() == [0, 0, 1, 1]
    assert bytes(batch["input"][3].tolist()).startswith(b"val good 1 x")
    assert batch["input"].shape == (4, 20)  # cut
    write_classes(tmp_path / "b", 100)
    whole = opened("text_folder", root=str(tmp_path / "b"), use_mask=False)
    assert sum(whole.size(s) for s in whole.splits()) == 200
    assert (b"b good 5 " + b"x" * 50, 1) in whole._data[split_of("good/5.txt")]
    assert fetch(whole, "test")["input"].shape[1] == 1024
    assert task.fingerprint() != whole.fingerprint()


def test_folders_that_do_not_fit_are_named(tmp_path):
    def refused(message, root=tmp_path, **options):
        with pytest.raises(ConfigError, match=message):
            opened("text_folder", root=str(root), **options)

    refused(r"task\.root: there is no folder .*x", tmp_path / "x")
    refused(r"holds no folders, one for each class")
    write_classes(tmp_path / "train")
    refused(r"has train, but no folder val")
    (tmp_path / "val" / "bad").mkdir(parents=True)
    (tmp_path / "val" / "bad" / "0.txt").write_text("some")
    refused(r"task\.root: there is no file or folder .*val/good")
    refused(r"task\.max_bytes: 0", max_bytes=0)
    one = tmp_path / "one"
    for i in range(200):
        (one / "only").mkdir(parents=True, exist_ok=True)
        (one / "only" / f"{i}.txt").write_text("some")
    refused(r"there is only one class, \['only'\]", one)


def test_labelled_texts_of_the_hub(monkeypatch):
    from mixerzoo.tests.tasks.text.test_text import Table

    labels = {"value": [0, 1] * 50}
    module = types.ModuleType("datasets")
    module.load_dataset = lambda path, name=None, *, split: Table(
        text=[f"{split} {i}" for i in range(100)], label=labels["value"]
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    task = opened("hf_text_classes", dataset="some", max_bytes=16)
    assert sorted(task.splits()) == ["test", "train", "val"]
    assert task.size("train") + task.size("val") == 100
    assert 3 <= task.size("val") <= 20
    assert task.size("test") == 100
    assert (b"train 7", 1) in task._data["train" if split_of("7") == "train" else "val"]
    assert task.model_kwargs()["num_classes"] == 2
    for bad in (-1, "good"):
        labels["value"] = [0, bad] * 50
        with pytest.raises(ConfigError, match=r"task\.label_key: row 1 of train has the label"):
            opened("hf_text_classes", dataset="some")
    with pytest.raises(ConfigError, match=r'task\.label_key: there is no column "stars"'):
        opened("hf_text_classes", dataset="some", label_key="stars")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets"):
        opened("hf_text_classes")

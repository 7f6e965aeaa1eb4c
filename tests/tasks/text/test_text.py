"""Text tasks: which positions count, where corpora come from, and what is wrong with them."""

import hashlib
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.models import create_model
from mixerzoo.tasks import create_task
from mixerzoo.tasks.sequence.sequence import IGNORE
from mixerzoo.tasks.text import corpora, entropy, token_files
from mixerzoo.tasks.text.corpora import Document, in_hash_order, king_james, python_sources, split_of
from mixerzoo.tests.tasks.sequence_checks import check_positions, fetch

BYTES = bytes(range(32, 127))


@pytest.fixture
def book(tmp_path):
    """2,000 bytes, no two windows alike."""
    rng = np.random.RandomState(0)
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(rng.choice(list(BYTES), 2000).tolist()))
    return path


def opened(name="text", **options):
    task = create_task(name, **options)
    task.open()
    return task


def covered(task, split):
    """How often each token of a split is a target, and whether each target is the token that follows its input."""
    stream = task.stream(split).astype(int)
    batch = fetch(task, split)
    counts = np.zeros(len(stream), int)
    length = task.sequence_length
    starts = np.minimum(np.arange(task.size(split)) * task.eval_stride, len(stream) - 1 - length)
    for start, ids, target in zip(starts, batch["input"].numpy(), batch["target"].numpy(), strict=True):
        assert np.array_equal(ids, stream[start : start + length])
        counted = target != IGNORE
        assert np.array_equal(target[counted], stream[start + 1 : start + 1 + length][counted])
        counts[start + 1 : start + 1 + length] += counted
    return counts


@pytest.mark.parametrize("length", [7, 32, 99])
@pytest.mark.parametrize("stride", [1, 5, None])
def test_every_token_but_the_first_is_predicted_once(book, length, stride):
    task = opened(path=str(book), sequence_length=length, eval_stride=stride)
    for split in ("val", "test"):
        assert covered(task, split).tolist() == [0] + [1] * (len(task.stream(split)) - 1)
    batch = fetch(task, "val")
    context = torch.arange(length).expand_as(batch["target"])[1:][batch["target"][1:] != IGNORE]
    assert len(context) == 0 or context.min() >= length - task.eval_stride


def test_training_windows_are_at_random_places_and_whole(book):
    task = opened(path=str(book), sequence_length=32)
    stream = task.stream("train").tobytes()
    assert task.size("train") == 1800 // 32
    one, again = (fetch(task, "train", train=True, seed=s) for s in (0, 0))
    other = fetch(task, "train", train=True, seed=1)
    assert torch.equal(one["input"], again["input"])
    assert not torch.equal(one["input"], other["input"])
    for i, (ids, target) in enumerate(zip(one["input"].tolist(), one["target"].tolist(), strict=True)):
        place = stream.index(bytes(ids))
        assert bytes(target) == stream[place + 1 : place + 33]
        assert min(i * 32, len(stream) - 33) <= place < (i + 1) * 32
    plain = fetch(task, "train")  # without augmentation: a matter of the index
    assert torch.equal(plain["input"], fetch(task, "train", seed=5)["input"])
    assert bytes(plain["input"].flatten().tolist()) == stream[: plain["input"].numel()]


def test_loss_is_taken_at_every_position_in_training_and_once_in_evaluation(book):
    task = opened(path=str(book), sequence_length=24, eval_stride=10)
    assert bool((check_positions(task, "train")["target"] != IGNORE).all())
    counted = (check_positions(task, "val")["target"] != IGNORE).sum(1)
    assert counted.tolist() == [24, 10, 10, 10, 10, 10, 10, 10]
    # means over tokens, not over batches: a model that is right with probability 1/4 costs 2 bits
    metrics = task.metrics()
    for index in torch.arange(task.size("val")).split(3):
        batch = task.fetch("val", index, train=False, generator=torch.Generator())
        right = torch.nn.functional.one_hot(batch["target"].clamp_min(0), 256).float()
        logits = torch.where(right > 0, math.log(255 / 3), 0.0)
        task.update(metrics, lambda ids, logits=logits: logits, batch)
    figures = task.compute(metrics)
    assert figures["bpb"] == pytest.approx(2, abs=1e-4)
    assert figures["loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert metrics["loss"].weight == len(task.stream("val")) - 1
    assert task.metric == "bpb"
    assert not task.higher_is_better


def test_packed_documents(tmp_path):
    for name in range(80):
        (tmp_path / f"{name}.txt").write_bytes(BYTES[name % 10 : name % 10 + 5 + name % 7])
    task = opened(path=str(tmp_path), sequence_length=20, packed=True)
    batch = fetch(task, "train", train=True)
    ends = batch["input"] == 0
    assert torch.equal(batch["target"] == IGNORE, ends)  # nothing in the document tells how the next one begins
    ids = batch["document_ids"]
    assert torch.equal(ids[:, 1:] - ids[:, :-1], ends[:, :-1].long())
    model = create_model("transformer_tiny", dim=32, depth=1, **task.model_kwargs())
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(keep)
    some = {key: value[:4] for key, value in batch.items()}
    task.run(model, some)[:, -1].square().sum().backward()
    seen = embedded[0].grad.abs().sum(-1) > 0
    assert not (seen & (ids[:4] != ids[:4, -1:])).any()
    assert seen[:, -1].all()
    plain = opened(path=str(tmp_path), sequence_length=20)
    assert "document_ids" not in fetch(plain, "train", 2)
    assert bool((fetch(plain, "train", 2)["target"] != IGNORE).all())  # there the end is followed by a beginning


def test_masked_tokens(book):
    task = opened(path=str(book), sequence_length=50, objective="masked_lm", mask_fraction=0.3)
    assert task.model_kwargs() == {"vocab_size": 257, "sequence_length": 50, "objective": "masked_lm"}
    batch = fetch(task, "train", train=True)
    chosen = batch["target"] != IGNORE
    assert 0.25 < chosen.float().mean() < 0.35
    assert chosen.any(1).all()
    hidden = batch["input"] == 256
    assert (hidden <= chosen).all()
    assert 0.7 < hidden.sum() / chosen.sum() < 0.9
    left = torch.where(chosen, batch["target"], batch["input"])
    assert all(bytes(row) in task.stream("train").tobytes() for row in left.tolist())
    changed = chosen & ~hidden & (batch["input"] != batch["target"])
    assert 0 < changed.sum() < 0.2 * chosen.sum()
    check_positions(task, "val")
    one = fetch(task, "val", seed=0)
    assert torch.equal(one["input"], fetch(task, "val", seed=1)["input"])
    last = task.fetch("val", torch.tensor([1]), train=False, generator=torch.Generator())
    assert torch.equal(last["input"][0], one["input"][1])  # whichever batch the window is in
    assert torch.isfinite(task.loss(create_model("fnet_tiny", dim=32, depth=1, **task.model_kwargs()), one))


# -- corpora


def test_python_sources_are_split_by_file_for_good():
    documents = python_sources()
    names = {d.name for d in documents}
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)
    # a hash of the path: the same on every machine and in every version of Python
    assert [split_of(n) for n in ("os.py", "ast.py", "json/decoder.py")] == ["train", "train", "train"]
    share = {s: sum(split_of(n) == s for n in names) / len(names) for s in ("train", "val", "test")}
    assert 0.86 < share["train"] < 0.94
    task = opened("python_text", eval_bytes=5000)
    assert task.size("train") > 10_000
    assert len(task.stream("val")) == len(task.stream("test")) == 5000
    training = [d for d in documents if split_of(d.name) == "train"]
    assert task.stream("train").tobytes() == b"".join(d.content + b"\0" for d in training)
    first = in_hash_order([d for d in documents if split_of(d.name) == "val"])[0]
    assert task.stream("val").tobytes().startswith(first.content[:5000])
    assert len(task.fingerprint()) == 64


def test_python_sources_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"has no sources of its standard library in .* use task=text"):
        python_sources(tmp_path)


@pytest.fixture
def printing(tmp_path, monkeypatch):
    """A program of the name `bible` that prints what it is told to."""

    def make(text, status=0):
        program = tmp_path / "bible"
        (tmp_path / "text").write_bytes(text)
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'text'}\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


def test_king_james_from_a_program(printing):
    text = b"Ge1:1 In the beginning.\nGe1:2 And the earth.\n1Jn2:1 My little children.\n"
    printing(text)
    found = king_james(sha256=hashlib.sha256(text).hexdigest())
    assert found == [
        Document("Ge1", b"In the beginning.\nAnd the earth.\n"),
        Document("1Jn2", b"My little children.\n"),
    ]
    with pytest.raises(ConfigError, match=r"printed 72 bytes with the SHA-256 .*, not the expected cd45f0c9"):
        king_james()


def test_king_james_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="Install Debian's package bible-kjv"):
        opened("kjv")


def test_king_james_pinned():
    if shutil.which("bible") is None:
        pytest.skip("Debian's package bible-kjv is not installed")
    documents = king_james()
    assert len(documents) == 1189
    assert sum(d.content.count(b"\n") for d in documents) == corpora.KJV_VERSES == 31_102
    task = opened("kjv")
    assert task.fingerprint() == "888d1aeb1e89a71e32ac5f7dba034cd1ed8c4bd73d6c2d8586cf60e3dc56da10"
    assert task.stream("train")[:54].tobytes() == b"In the beginning God created the heaven and the earth."
    assert sum(len(task.stream(s)) for s in task.splits()) == sum(len(d.content) + 1 for d in documents)


def test_text_of_a_folder_and_of_two_files(tmp_path, book):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for i in range(120):
        (folder / "deep" / f"{i}.txt").write_text(f"file {i} ")
    (folder / "ignored.bin").write_bytes(b"\1\2")
    (folder / "empty.txt").write_bytes(b"")
    task = opened(path=str(folder), sequence_length=4)
    whole = b"".join(task.stream(s).tobytes() for s in task.splits())
    for i in range(120):
        name = f"deep/{i}.txt"
        assert whole.count(f"file {i} \0".encode()) == 1
        assert f"file {i} \0".encode() in task.stream(split_of(name)).tobytes()
    two = opened(path=str(folder), val_path=str(book), sequence_length=4)
    assert two.splits() == ("train", "val")
    assert two.stream("val").tobytes() == book.read_bytes() + b"\0"
    assert two.fingerprint() != task.fingerprint()


def test_one_file_is_cut_in_three(book):
    task = opened(path=str(book), sequence_length=8)
    assert [len(task.stream(s)) for s in task.splits()] == [1801, 101, 101]
    assert b"".join(task.stream(s).tobytes()[:-1] for s in task.splits()) == book.read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files(tmp_path, dtype):
    tokens = np.random.RandomState(0).randint(0, 1000, 5000)
    path, val = tmp_path / "train.bin", tmp_path / "val.bin"
    tokens.astype(dtype).tofile(path)
    tokens[::-1].astype(dtype).tofile(val)
    options = {"train": str(path), "vocab_size": 1000, "dtype": dtype, "sequence_length": 16}
    task = opened("token_bin", **options, val_fraction=0.1)
    assert isinstance(task.stream("train"), np.memmap)
    assert [len(task.stream(s)) for s in task.splits()] == [4500, 500]
    assert np.array_equal(np.concatenate([task.stream(s) for s in task.splits()]), tokens)
    assert covered(task, "val").tolist() == [0] + [1] * 499
    assert task.model_kwargs()["vocab_size"] == 1000
    assert (task.metric, task.higher_is_better) == ("loss", False)
    check_positions(task, "val")
    more = opened("token_bin", **options, val=str(val), test=str(val), eval_tokens=100, separator=0, packed=True)
    assert [len(more.stream(s)) for s in more.splits()] == [5000, 100, 100]
    batch = fetch(more, "train")
    assert torch.equal(batch["target"] == IGNORE, batch["input"] == 0)
    assert task.fingerprint() != more.fingerprint()


def test_a_token_out_of_range_is_named(tmp_path):
    tokens = np.arange(200) % 50
    tokens[37] = 99
    tokens.astype("<u2").tofile(tmp_path / "t.bin")
    task = opened("token_bin", train=str(tmp_path / "t.bin"), vocab_size=50, sequence_length=16, val_fraction=0.2)
    with pytest.raises(ConfigError, match=r"the token 99 at place 37 of the data is not below 50.*task\.dtype=uint16"):
        fetch(task, "train")


def test_large_files_are_hashed_in_pieces(tmp_path, monkeypatch):
    from mixerzoo.tasks.text import text

    tokens = np.arange(4000).astype("<u2")
    tokens.tofile(tmp_path / "t.bin")
    whole = opened("token_bin", train=str(tmp_path / "t.bin"), vocab_size=4000, sequence_length=8).fingerprint()
    monkeypatch.setattr(text, "_HASH_LIMIT", 100)
    monkeypatch.setattr(text, "_PIECE", 8)
    pieces = opened("token_bin", train=str(tmp_path / "t.bin"), vocab_size=4000, sequence_length=8).fingerprint()
    tokens[0] = 7
    tokens.tofile(tmp_path / "t.bin")
    other = opened("token_bin", train=str(tmp_path / "t.bin"), vocab_size=4000, sequence_length=8).fingerprint()
    assert len({whole, pieces, other}) == 3


class Table(dict):
    """As much of a table of `datasets` as is used."""

    @property
    def column_names(self):
        return list(self)

    def __len__(self):
        return len(next(iter(self.values())))

    def select(self, rows):
        return Table({k: [v[i] for i in rows] for k, v in self.items()})


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, which is optional; returns what it was asked for."""
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        if split not in ("train", "validation"):
            raise ValueError(f'Unknown split "{split}".\nmore')
        return Table(text=[f"{split} row {i}" if i else "" for i in range(100)], number=list(range(100)))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_text_of_the_hub(hub):
    task = opened("hf_text", dataset="someone/some", config="raw", sequence_length=8)
    assert hub == [("someone/some", "raw", "train"), ("someone/some", "raw", "validation")]
    assert task.splits() == ("train", "val")
    assert task.stream("train").tobytes() == b"".join(b"train row %d\0" % i for i in range(1, 100))
    by_row = opened("hf_text", dataset="some", val_split=None, sequence_length=4)
    assert by_row.splits() == ("train", "val", "test")
    assert b"train row 7\0" in by_row.stream(split_of("7")).tobytes()
    few = opened("hf_text", dataset="some", max_documents=10, sequence_length=4)
    assert few.stream("train").tobytes().count(b"\0") == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "test"}, r"task\.dataset: the split 'test' of \"some\" cannot be loaded: Unknown split"),
        ({"text_key": "txt"}, r'task\.text_key: there is no column "txt"\. Allowed: text, number'),
        ({"text_key": "number"}, r'task\.text_key: the column "number" holds int, not text'),
    ],
)
def test_hub_mistakes_are_named(hub, options, message):
    with pytest.raises(ConfigError, match=message):
        opened("hf_text", dataset="some", **options)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'needs the package datasets: pip install "mixerzoo\[text\]"'):
        opened("hf_text", dataset="some")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nonexistent/x"}, r"task\.path: there is no file or folder /nonexistent/x"),
        ({"val_path": "/nonexistent/x"}, r"task\.val_path: there is no file or folder"),
        ({"sequence_length": 0}, r"task\.sequence_length: 0 must be at least 1"),
        ({"sequence_length": 2000}, r"the split train has 1,801 tokens; a window of 2000 .* at least 2,001"),
        ({"sequence_length": 101}, r"the split val has 101 tokens"),
        ({"sequence_length": 64, "eval_bytes": 50}, r"the split val has 50 tokens"),
        ({"eval_stride": 300}, r"task\.eval_stride: 300 is more than sequence_length=256"),
        ({"eval_stride": 0}, r"task\.eval_stride: 0 must be at least 1"),
        ({"eval_bytes": 1}, r"task\.eval_bytes: 1 must be at least 2"),
        ({"objective": "masked"}, r"task\.objective: 'masked'"),
        ({"objective": "masked_lm", "packed": True}, r"task\.packed: not with objective=masked_lm"),
        ({"objective": "masked_lm", "mask_fraction": 0.0}, r"task\.mask_fraction: 0 leaves nothing"),
        ({"objective": "masked_lm", "mask_fraction": 1.0}, r"task\.mask_fraction: 1\.0 must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_named(book, options, message):
    with pytest.raises(ConfigError, match=message):
        opened(**{"path": str(book), **options})


def test_folders_without_enough_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"suffixes .txt in {tmp_path}")):
        opened(path=str(tmp_path), suffixes=[".txt"])
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds no text"):
        opened(path=str(tmp_path))
    for name in "bc":
        (tmp_path / f"{name}.txt").write_bytes(b"some")
    with pytest.raises(ConfigError, match=r"has 2 files, too few for a split by file"):
        opened(path=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "/nonexistent.bin"}, r"task\.train: there is no file /nonexistent\.bin"),
        ({"dtype": "uint32"}, r"has 402 bytes, not a whole number of uint32 tokens"),
        ({"dtype": "int16"}, r"task\.dtype: 'int16'"),
        ({"val_fraction": 0.0}, r"task\.val_fraction: 0\.0"),
        ({"vocab_size": 1}, r"task\.vocab_size: 1"),
        ({"packed": True}, r"task\.separator: `packed` needs"),
        ({"separator": 50}, r"task\.separator: 50 is not an id of the vocabulary, \[0, 50\)"),
        ({"eval_tokens": 1}, r"task\.eval_tokens: 1"),
        ({"val": ""}, r"task\.val: there is no file"),
    ],
)
def test_bad_token_files_are_named(tmp_path, options, message):
    (np.arange(201) % 50).astype("<u2").tofile(tmp_path / "t.bin")
    assert token_files.TokenFiles.name == "token_bin"
    given = {"train": str(tmp_path / "t.bin"), "vocab_size": 50, "sequence_length": 1, **options}
    with pytest.raises(ConfigError, match=message):
        opened("token_bin", **given)


# -- entropies


def test_entropies_of_tokens_with_known_ones():
    rng = np.random.RandomState(0)
    uniform = rng.randint(0, 4, 40_000).astype(np.uint8)
    assert entropy.unigram_entropy(uniform) == pytest.approx(2, abs=1e-3)
    assert entropy.bigram_entropy(uniform) == pytest.approx(2, abs=1e-3)
    cycle = np.tile(np.arange(8, dtype=np.uint8), 100)
    assert entropy.unigram_entropy(cycle) == pytest.approx(3)
    assert entropy.bigram_entropy(cycle) == 0
    # a chain that stays with probability 3/4
    flips = np.cumsum(rng.random_sample(40_000) < 0.25).astype(np.uint8) % 2
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert entropy.bigram_entropy(flips) == pytest.approx(expected, abs=0.01)
    assert entropy.fitted_bigram(flips, flips[:5000]) == pytest.approx(expected, abs=0.03)
    assert entropy.fitted_unigram(flips, flips[:5000]) == pytest.approx(1, abs=0.02)
    # what was never seen costs bits, but not infinitely many
    strange = np.full(10, 200, np.uint8)
    assert 10 < entropy.fitted_unigram(uniform, strange) < 20
    assert 10 < entropy.fitted_bigram(uniform, strange) < 20


def test_fitted_models_are_no_better_than_a_splits_own_entropies(book):
    task = opened(path=str(book), sequence_length=8)
    train, val = task.stream("train"), task.stream("val")
    assert entropy.fitted_unigram(train, val) >= entropy.unigram_entropy(val)
    assert entropy.fitted_bigram(train, val) >= entropy.bigram_entropy(val)


def test_entropy_command(book, capsys):
    assert entropy.main(["text", f"task.path={book}", "sequence_length=8"]) == 0
    printed = capsys.readouterr().out
    task = opened(path=str(book), sequence_length=8)
    assert task.fingerprint() in printed
    assert f"| val | 101 | 8.0000 | {entropy.unigram_entropy(task.stream('val')):.4f} |" in printed
    assert entropy.main(["digits"]) == 2
    assert entropy.main(["text", "path"]) == 2
    assert entropy.main(["txet"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert '"digits" is not a task of text' in errors[0]
    assert "options are written key=value" in errors[1]
    assert 'Did you mean "text"' in errors[2]

"""Folders as people have them: what is a split, a class, a sample, and that nothing vanishes silently."""

import os

import numpy as np
import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task
from mixerzoo.tasks.folders import is_hidden, split_named
from PIL import Image

RANDOM = np.random.RandomState(0)


def put(root, *names):
    """A sample of its own in each of the files: a picture, or a text where the suffix says so."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_bytes(bytes(RANDOM.randint(97, 123, 40).tolist()))
        else:
            Image.fromarray(RANDOM.randint(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def opened(kind, root):
    task = create_task(kind, root=str(root), **({"image_size": 8} if kind == "imagefolder" else {}))
    task.open()
    return task


KINDS = [("imagefolder", "png"), ("text_folder", "txt")]


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Training", "train"), ("TRAIN", "train"), ("train_set", "train"), ("trainset", "train"),
     ("seg_train", "train"), ("train2017", "train"), ("Train Images", "train"), ("val", "val"), ("Valid", "val"),
     ("validation", "val"), ("dev", "val"), ("eval", "val"), ("Test", "test"), ("testing", "test"),
     ("test-data", "test"), ("cat", None), ("contest", None), ("trainers", None), ("latest", None), ("images", None),
     ("value", None), ("2", None)],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_named(name) == split


def test_hidden_names():
    assert all(map(is_hidden, (".git", "._cat.png", ".ipynb_checkpoints", "__MACOSX", "@eaDir")))
    assert not any(map(is_hidden, ("cat", "_cat", "a.png")))


def test_every_format_that_pillow_reads_counts(tmp_path):
    put(tmp_path, "train/cat/a.png", "train/cat/b.JPG", "train/bird/a.webp", "train/bird/b.WEBP", "train/dog/a.bmp")
    put(tmp_path, "train/dog/b.tif", "train/dog/c.gif", "train/dog/deep/d.ppm", "val/cat/a.png", "val/bird/a.webp")
    put(tmp_path, "val/dog/a.tiff")
    task = opened("imagefolder", tmp_path)
    assert task.classes == ["bird", "cat", "dog"]
    assert task.labels("train").bincount().tolist() == [2, 2, 4]
    assert task.labels("val").bincount().tolist() == [1, 1, 1]


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_what_is_no_sample_is_left_out_and_named(kind, suffix, tmp_path):
    for split in ("train", "val"):
        put(tmp_path, *(f"{split}/{name}/{i}.{suffix}" for name in ("cat", "dog") for i in range(3)))
    put(tmp_path, f"train/.ipynb_checkpoints/0.{suffix}", f"train/cat/.hidden.{suffix}", f"train/cat/._0.{suffix}")
    put(tmp_path, f"train/__MACOSX/0.{suffix}", f".cache/train/x/0.{suffix}", f"unlabelled/0.{suffix}")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "cat" / "notes.xyz").write_text("about cats")
    (tmp_path / "train" / "Thumbs.db").write_text("x")
    task = opened(kind, tmp_path)
    assert task.classes == ["cat", "dog"]
    assert (task.size("train"), task.size("val")) == (6, 6)
    notes = "\n".join(task.notes())
    for said in (
        "hidden names",
        "of another kind (.xyz): train/cat/notes.xyz",
        "train/empty",
        "unlabelled",
        "Thumbs.db",
    ):
        assert said in notes, notes
    assert "left out, folders beside the splits: unlabelled" in notes


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_splits_by_other_names(kind, suffix, tmp_path):
    names = {"train": "Training", "val": "Validation", "test": "Testing"}
    for number, folder in enumerate(names.values()):
        put(tmp_path, *(f"{folder}/{name}/{i}.{suffix}" for name in ("cat", "dog") for i in range(3 - number)))
    task = opened(kind, tmp_path)
    assert {split: task.size(split) for split in task.splits()} == {"train": 6, "val": 4, "test": 2}
    assert task.classes == ["cat", "dog"]


def test_validation_is_never_taken_from_the_test_split(tmp_path):
    put(
        tmp_path,
        *(f"{s}/{name}/{i}.png" for s in ("Training", "Testing") for name in ("cat", "dog") for i in range(10)),
    )
    task = opened("imagefolder", tmp_path)
    assert {split: task.size(split) for split in task.splits()} == {"train": 18, "val": 2, "test": 20}
    seen = [
        task.fetch(s, torch.arange(task.size(s)), train=False, generator=torch.Generator())["input"]
        for s in ("train", "val", "test")
    ]
    assert torch.cat(seen).flatten(1).unique(dim=0).shape[0] == 40


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["train/x.{}"], r"1 (image|text) in .*train belong to no class, such as x\."),
        (["x.{}", "y.{}"], r"2 (image|text)s in .* belong to no class, such as x\."),
        (["valid/cat/0.{}", "valid/dog/0.{}"], r"val and valid .* both name the split val"),
        (["Train/cat/0.{}", "Train/dog/0.{}"], r"Train and train .* both name the split train"),
        (["train/cat/test/0.{}"], r"cat/test looks like the folder of a split inside of a class"),
        (["train/fish/0.{}"], r"val/fish"),
        (["val/Cat/0.{}"], r"classes differ .*Cat"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(kind, suffix, extra, said, tmp_path):
    put(tmp_path, *(f"{s}/{name}/{i}.{suffix}" for s in ("train", "val") for name in ("cat", "dog") for i in range(2)))
    opened(kind, tmp_path)
    put(tmp_path, *(name.format(suffix) for name in extra))
    with pytest.raises(ConfigError, match=rf"^task\.root: .*{said}"):
        opened(kind, tmp_path)


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_a_set_without_training_or_in_a_folder_of_its_own_is_refused(kind, suffix, tmp_path):
    put(tmp_path, *(f"set/{s}/{name}/0.{suffix}" for s in ("Test", "valid") for name in ("cat", "dog")))
    with pytest.raises(ConfigError, match=r"has Test, valid, but no folder (named )?train"):
        opened(kind, tmp_path / "set")
    with pytest.raises(ConfigError, match=r"split inside of a class.*say task\.root=\S*/set\."):
        opened(kind, tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere", "a.png", "b.png")
    put(tmp_path / "set", "cat/a.png", "cat/b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "dog")
    os.symlink(tmp_path / "set" / "cat", tmp_path / "set" / "cat" / "again")
    task = opened("imagefolder", tmp_path / "set")
    assert sum(task.labels(s).bincount(minlength=2) for s in task.splits()).tolist() == [2, 2]


def test_pictures_in_two_splits_are_named(tmp_path):
    put(tmp_path, *(f"{s}/{name}/{i}.png" for s in ("train", "test") for name in ("cat", "dog") for i in range(3)))
    assert not [note for note in opened("imagefolder", tmp_path).notes() if note.startswith("warning")]
    (tmp_path / "test" / "cat" / "9.png").write_bytes((tmp_path / "train" / "cat" / "1.png").read_bytes())
    (warning,) = [note for note in opened("imagefolder", tmp_path).notes() if note.startswith("warning")]
    assert "1 of 13 images are in more than one split" in warning
    assert "test/cat/9.png" in warning
    assert "train/cat/1.png" in warning


def test_hidden_folders_of_a_corpus_are_passed_over(tmp_path):
    put(tmp_path, *(f"deep/{i}.txt" for i in range(120)))
    before = create_task("text", path=str(tmp_path), sequence_length=8)
    before.open()
    put(tmp_path, ".git/0.txt", "deep/.ipynb_checkpoints/3.txt", "__MACOSX/3.txt")
    after = create_task("text", path=str(tmp_path), sequence_length=8)
    after.open()
    assert after.fingerprint() == before.fingerprint()
    assert "left out, hidden names: .git and 2 more" in after.notes()


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_the_fingerprint_is_of_content_classes_and_splits(kind, suffix, tmp_path, monkeypatch):
    def write(root):
        np.random.seed(0)
        RANDOM.seed(1)
        put(
            root,
            *(
                f"{s}/{name}/{i}.{suffix}"
                for s in ("train", "val", "test")
                for name in ("cat", "dog")
                for i in range(4)
            ),
        )
        return root

    def known(root):
        task = opened(kind, root)
        return task.fingerprint(), tuple(task.classes), tuple((s, task.size(s)) for s in task.splits())

    def edit(root):
        put(root, f"train/dog/1.{suffix}")

    def swap(root):
        a, b = (root / "train" / name / f"1.{suffix}" for name in ("cat", "dog"))
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)

    def rename(root):
        for split in ("train", "val", "test"):
            (root / split / "dog").rename(root / split / "wolf")

    def drop(root):
        for path in (root / "test").rglob(f"*.{suffix}"):
            path.unlink()
        for path in (root / "test" / "cat", root / "test" / "dog", root / "test"):
            path.rmdir()

    def move(root):
        (root / "val" / "cat" / f"3.{suffix}").rename(root / "train" / "cat" / f"9.{suffix}")

    base = known(write(tmp_path / "base"))
    assert known(write(tmp_path / "copy")) == base  # not of where it lies, or of times
    found = {}
    for change in (edit, swap, rename, drop, move):
        change(write(tmp_path / change.__name__))
        found[change.__name__] = known(tmp_path / change.__name__)
    assert len({base, *found.values()}) == 6
    if kind == "imagefolder":  # of a large set the same is seen, but for contents outside of the sample
        from mixerzoo.tasks.images import folder

        monkeypatch.setattr(folder, "VERIFY_LIMIT", 3)
        large = {known(tmp_path / name) for name in ("base", *found)}
        assert len(large) == 6

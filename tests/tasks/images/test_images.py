"""Image tasks: splits, augmentation, files on disk, and what is wrong with them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.tasks import create_task, list_tasks, task_options
from mixerzoo.tasks.images import memory
from mixerzoo.tasks.images.augment import random_crop, random_erase, random_flip
from mixerzoo.tasks.images.memory import DEBIAN_FASHION, read_idx, stratified
from PIL import Image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fetch(task, split, count, *, train=False, seed=0):
    return task.fetch(split, torch.arange(count), train=train, generator=generator(seed))


@pytest.fixture(scope="module")
def digits():
    task = create_task("digits")
    task.open()
    return task


def test_digits_are_split_once_and_for_all(digits):
    sizes = [digits.size(s) for s in ("train", "val", "test")]
    assert sizes == [1257, 180, 360]
    images = [fetch(digits, s, n)["input"] for s, n in zip(digits.splits(), sizes, strict=True)]
    rows = torch.cat(images).flatten(1)
    assert rows.unique(dim=0).shape[0] == 1797  # nothing is in two splits
    labels = fetch(digits, "test", 360)["target"]
    assert labels.bincount().min() >= 34
    assert digits.fingerprint() == "87eba65514a3" + digits.fingerprint()[12:]  # pinned: data and split
    assert digits.model_kwargs() == {"num_classes": 10, "in_chans": 1, "image_size": [8, 8]}
    assert digits.example(3)[0].shape == (3, 1, 8, 8)
    assert images[0].mean().abs() < 1e-3
    assert images[0].std() == pytest.approx(1, abs=1e-3)


def test_a_batch_depends_on_its_generator_alone():
    task = create_task("digits", crop_padding=2, flip=True, erase=0.5, randaugment="rand-m9-mstd0.5-inc1")
    task.open()
    one = fetch(task, "train", 16, train=True)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert torch.equal(fetch(task, "train", 16, train=True)["input"], one["input"])
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is as it was
    assert not torch.equal(fetch(task, "train", 16, train=True, seed=1)["input"], one["input"])
    plain = [fetch(task, "val", 16, seed=s)["input"] for s in (0, 1)]
    assert torch.equal(*plain)


@pytest.mark.parametrize(
    "option", [{"crop_padding": 2}, {"flip": True}, {"erase": 1.0}, {"randaugment": "rand-m9-n3"}, {"image_size": 12}]
)
def test_every_augmentation_has_an_effect(digits, option):
    task = create_task("digits", **option)
    task.open()
    ours, plain = (fetch(t, "train", 16, train=True)["input"] for t in (task, digits))
    assert ours.shape[2:] == task.image_size
    assert ours.shape != plain.shape or not torch.equal(ours, plain)


def test_random_crop_is_a_window_of_the_padded_image():
    x = torch.rand(64, 2, 5, 4)
    y = random_crop(x, 2, generator())
    padded = torch.nn.functional.pad(x, (2,) * 4)
    places = set()
    for image, source in zip(y, padded, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, source[:, i : i + 5, j : j + 4])]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 15
    assert random_crop(x, 0, generator()) is x


def test_random_flip_and_erase():
    x = torch.rand(200, 1, 6, 6) + 0.1
    flipped = random_flip(x, generator())
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert ((flipped == x).flatten(1).all(1) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130
    erased = random_erase(x, 0.5, generator())
    changed = (erased == 0).flatten(1).sum(1)
    assert 70 < (changed > 0).sum() < 130
    assert changed.max() <= 18
    box = (erased[changed.argmax()] == 0)[0]
    rows, columns = box.any(1), box.any(0)
    assert torch.equal(box, rows[:, None] & columns[None])
    assert torch.equal(random_erase(x, 0.0, generator()), x)


def test_stratified_sets_are_disjoint_proportional_and_exact():
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    parts = stratified(labels, [60, 20, 21])
    assert [len(p) for p in parts] == [60, 20, 21]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(101))
    assert abs(np.bincount(labels[parts[0]]) - np.array([30, 18, 12])).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(parts, stratified(labels, [60, 20, 21]), strict=True))
    with pytest.raises(ConfigError, match="102"):
        stratified(labels, [102])


def test_losses_and_metrics(digits):
    batch = fetch(digits, "val", 180)
    logits = torch.nn.functional.one_hot(batch["target"], 10).float() * 20
    logits[:45] = logits[:45].roll(1, dims=1)  # a quarter wrong, the truth in second place or lower
    metrics = digits.metrics()
    for part in torch.arange(180).split(64):
        digits.update(metrics, lambda x, part=part: logits[part], {k: v[part] for k, v in batch.items()})
    figures = digits.compute(metrics)
    assert figures["top1"] == pytest.approx(0.75)
    assert figures["top5"] >= figures["top1"]
    assert figures["loss"] == pytest.approx(20 * 0.25, abs=0.01)
    confusion = torch.tensor(figures["confusion"])
    assert confusion.sum() == 180
    assert confusion.trace() == 135

    smooth = create_task("digits", label_smoothing=0.2)
    smooth.open()
    expected = torch.nn.functional.cross_entropy(logits, batch["target"], label_smoothing=0.2)
    assert smooth.loss(lambda x: logits, batch) == pytest.approx(expected.item())
    assert digits.loss(lambda x: logits, batch) < expected


@pytest.mark.parametrize("option", [{"mixup": 0.5}, {"cutmix": 1.0}])
def test_mixing(option):
    task = create_task("digits", **option)
    task.open()
    batch = fetch(task, "train", 8)
    before = batch["input"].clone()
    np.random.seed(0)
    mixed = task.augment(batch)
    assert torch.equal(batch["input"], before)
    assert not torch.equal(mixed["input"], before)
    assert mixed["target"].shape == (8, 10)
    assert torch.allclose(mixed["target"].sum(1), torch.ones(8))
    with pytest.raises(ConfigError, match="even"):
        task.augment(fetch(task, "train", 7))


def idx(path: Path, array: np.ndarray, *, cut: int = 0) -> None:
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    with gzip.open(path, "wb") as f:
        f.write(data[: len(data) - cut])


def test_idx_files(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)
    idx(tmp_path / "b.gz", array, cut=3)
    with pytest.raises(ConfigError, match=r"b\.gz.*cut off"):
        read_idx(tmp_path / "b.gz")
    (tmp_path / "c.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"c\.gz.*cut off"):
        read_idx(tmp_path / "c.gz")


def test_fashion_mnist_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"task\.root.*train-images-idx3-ubyte\.gz"):
        create_task("fashion_mnist", root=str(tmp_path)).open()
    monkeypatch.setattr(memory, "DEBIAN_FASHION", tmp_path / "debian")
    monkeypatch.setenv("MIXERZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "try_download", lambda download: "no network")
    with pytest.raises(ConfigError, match=r"no network.*dataset-fashion-mnist.*task\.root"):
        create_task("fashion_mnist").open()


@pytest.mark.skipif(not DEBIAN_FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    small, full = create_task("fashion_mnist_10k"), create_task("fashion_mnist")
    for task, size in ((small, 10_000), (full, 55_000)):
        task.open()
        assert [task.size(s) for s in ("train", "val", "test")] == [size, 5_000, 10_000]
        assert fetch(task, "train", size)["target"].bincount().tolist() == [size // 10] * 10
        assert task.model_kwargs() == {"num_classes": 10, "in_chans": 1, "image_size": [28, 28]}
    held = [fetch(t, "val", 5_000)["target"] for t in (small, full)]
    assert torch.equal(*held)
    assert small.fingerprint() != full.fingerprint()


def test_cifar_says_where_to_put_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXERZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "try_download", lambda download: "no network")
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        with pytest.raises(ConfigError) as caught:
            create_task(name).open()
        for part in ("no network", str(tmp_path / folder), "https://", "task.root"):
            assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"task\.download=false"):
        create_task("cifar10", download=False).open()


@pytest.fixture
def tree(tmp_path):
    random = np.random.RandomState(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.randint(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def folder_task(root, **options):
    task = create_task("imagefolder", root=str(root), image_size=16, **options)
    task.open()
    return task


def test_a_folder_of_images(tree):
    task = folder_task(tree)
    assert task.splits() == ("train", "val")
    assert (task.size("train"), task.size("val")) == (12, 4)
    assert task.classes == ["cat", "dog"]
    assert task.model_kwargs() == {"num_classes": 2, "in_chans": 3, "image_size": [16, 16]}
    batch = fetch(task, "train", 12, train=True)
    assert batch["input"].shape == (12, 3, 16, 16)
    assert batch["target"].bincount().tolist() == [6, 6]
    assert torch.equal(fetch(task, "train", 12, train=True)["input"], batch["input"])
    assert not torch.equal(fetch(task, "train", 12, train=True, seed=1)["input"], batch["input"])
    assert torch.equal(fetch(task, "val", 4)["input"], fetch(task, "val", 4, seed=1)["input"])
    before = task.fingerprint()
    assert folder_task(tree).fingerprint() == before
    Image.new("RGB", (20, 24)).save(tree / "train" / "cat" / "0.png")
    assert folder_task(tree).fingerprint() != before


def test_validation_images_are_kept_apart_where_there_are_none(tree):
    task = folder_task(tree / "train")
    assert task.splits() == ("train", "val")
    assert (task.size("train"), task.size("val")) == (11, 1)
    whole = torch.cat([fetch(task, s, task.size(s))["input"] for s in task.splits()])
    assert whole.flatten(1).unique(dim=0).shape[0] == 12


def test_what_is_wrong_with_a_folder(tree, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match=r"task\.root.*does not exist"):
        folder_task(tree / "nowhere")
    with pytest.raises(ConfigError, match=r"no images in"):
        folder_task(empty)
    with pytest.raises(ConfigError, match=r"task\.num_classes: 5.* 2 classes"):
        folder_task(tree, num_classes=5)
    with pytest.raises(ConfigError, match=r"task\.num_classes: 1000"):
        create_task("imagenet", root=str(tree)).open()
    (tree / "val" / "dog").rename(tree / "val" / "fox")
    with pytest.raises(ConfigError, match=r"classes differ.*fox"):
        folder_task(tree)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_image_is_named(tree, damage, monkeypatch):
    path = tree / "train" / "dog" / "3.png"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"not an image", "empty": b""}[damage])
    with pytest.raises(ConfigError, match=r"dog/3\.png.*cannot be read as an image"):
        folder_task(tree)
    # in a set too large to be read twice it shows when its turn comes, from a worker process too
    from mixerzoo.tasks.images import folder
    from mixerzoo.training.data import TrainingData

    monkeypatch.setattr(folder, "VERIFY_LIMIT", 3)
    task = folder_task(tree)
    for workers in (0, 1):
        data = TrainingData(
            task, seed=0, batch_size=12, accumulate=1, rank=0, world=1, workers=workers, device=torch.device("cpu")
        )
        with pytest.raises(ConfigError, match=r"dog/3\.png") as caught:
            list(data.steps(0, 1))
        assert "Traceback" not in str(caught.value)


class Features(dict):
    """Columns of a table of `datasets`."""


class Table:
    _fingerprint = "abc"
    features = Features(image=object(), label=type("ClassLabel", (), {"names": ["no", "yes"]})())


class Reader:
    dataset = Table()

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return open(self.path, "rb"), index % 2


def test_hugging_face_sets(tree, monkeypatch):
    import timm.data

    asked = []

    def create_dataset(name, **options):
        asked.append((name, options["split"]))
        return type("Dataset", (), {"reader": Reader(tree / "train" / "cat" / "0.png")})()

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    task = create_task("hfds", dataset="some/set", image_size=16)
    task.open()
    assert asked == [("hfds/some/set", "train"), ("hfds/some/set", "test")]
    assert task.splits() == ("train", "val", "test")
    assert (task.size("train"), task.size("val"), task.size("test")) == (3, 1, 4)
    assert task.classes == ["no", "yes"]
    assert fetch(task, "test", 4)["target"].tolist() == [0, 1, 0, 1]
    with pytest.raises(ConfigError, match=r'task\.input_key: no column "img"'):
        create_task("hfds", dataset="some/set", input_key="img").open()

    def refuse(name, **options):
        raise ConnectionError("the hub is not reachable")

    monkeypatch.setattr(timm.data, "create_dataset", refuse)
    with pytest.raises(ConfigError, match=r"task\.dataset.*the hub is not reachable"):
        create_task("hfds", dataset="some/set").open()


def test_registry():
    assert {"digits", "fashion_mnist", "fashion_mnist_10k", "cifar10", "cifar100", "imagefolder"} <= set(list_tasks())
    assert "crop_padding" in task_options("digits")
    with pytest.raises(ConfigError, match=r'task\.name: "digit".*Did you mean "digits"'):
        create_task("digit")
    with pytest.raises(ConfigError, match=r"task\.root"):
        create_task("imagefolder")

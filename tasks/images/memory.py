"""Small image sets that live in memory as tensors: digits, Fashion-MNIST, CIFAR.

Axis letters: N images of a split, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...schema import Count, Fraction, Size
from ..base import Batch
from .augment import rand_augment, random_crop, random_erase, random_flip
from .classification import ImageClassification, MixOptions
from .preprocessing import NormalisedImage

# Debian's package dataset-fashion-mnist puts the four files here.
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def cache_dir() -> Path:
    """Where downloads go: `$MIXERZOO_CACHE`, else `$XDG_CACHE_HOME/mixerzoo`, else `~/.cache/mixerzoo`."""
    if os.environ.get("MIXERZOO_CACHE"):
        return Path(os.environ["MIXERZOO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixerzoo"


def stratified(labels: np.ndarray, counts: list[int], seed: int = 0) -> list[np.ndarray]:
    """Disjoint sorted index sets of the given sizes with the classes' proportions of `labels`; fixed by `seed`.

    Class by class in proportion, the rounding left over going to the largest remainders. The last set may be smaller
    than asked only if the counts add up to more than there is, which is refused.
    """
    if sum(counts) > len(labels):
        raise ConfigError(f"{sum(counts)} samples asked for, {len(labels)} there.")
    # RandomState's stream is frozen by NumPy's compatibility policy, so the splits stay what they are.
    rng = np.random.RandomState(seed)
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    used = np.zeros(len(pools), dtype=int)
    total = len(labels)
    found = []
    for count in counts:
        share = np.array([len(pool) for pool in pools]) * count / total
        take = np.minimum(np.floor(share).astype(int), [len(p) for p in pools] - used)
        for c in np.argsort(-(share - np.floor(share)), kind="stable").tolist() * 2:
            if take.sum() == count:
                break
            take[c] += int(used[c] + take[c] < len(pools[c]))
        found.append(np.sort(np.concatenate([p[u : u + t] for p, u, t in zip(pools, used, take, strict=True)])))
        used += take
    return found


class _WithoutMoves(MixOptions, total=False):
    """What all sets in memory take, but for crops and flips."""

    image_size: Size | None
    erase: Fraction
    randaugment: str | None


class MemoryOptions(_WithoutMoves, total=False):
    """What all sets in memory take; see `MemoryImages`."""

    crop_padding: Count
    flip: bool


class MemoryImages(ImageClassification):
    """Base of the sets in memory: batches are gathered and augmented as tensors, no image at a time.

    A subclass gives `load`. Images are normalised with mean and deviation of the training split.

    Args:
        image_size: side to which images are resized (bilinear); None keeps theirs.
        crop_padding: zeros around the image before a random crop of the original size; 0 for none.
        flip: mirror left to right at random.
        erase: probability of random erasing.
        randaugment: timm's RandAugment policy, e.g. `rand-m9-mstd0.5-inc1`; None for none. Slow: image by image.
        mixing: see `ImageClassification`.
    """

    def __init__(
        self,
        *,
        image_size: Size | None = None,
        crop_padding: Count = 0,
        flip: bool = False,
        erase: Fraction = 0.0,
        randaugment: str | None = None,
        **mixing: Unpack[MixOptions],
    ) -> None:
        super().__init__(**mixing)
        self.resize = image_size
        self.crop_padding, self.flip = crop_padding, flip
        self.erase = erase
        self.randaugment = randaugment
        if randaugment is not None:
            self._check_policy(randaugment)
        self._data: dict[str, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def _check_policy(policy: str) -> None:
        from timm.data.auto_augment import rand_augment_transform

        try:
            rand_augment_transform(policy, {"translate_const": 2, "img_mean": (0, 0, 0)})
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f'task.randaugment: "{policy}" is not a policy of timm\'s RandAugment '
                f"({error or type(error).__name__}); an example is rand-m9-mstd0.5-inc1."
            ) from error

    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Images `(N, H, W)` or `(N, H, W, C)` uint8 and labels `(N,)` of train, val and test; sets `classes`."""
        raise NotImplementedError

    def open(self) -> None:
        if self._data:
            return
        for split, (images, labels) in self.load().items():
            if len(images) == 0 or len(images) != len(labels):
                raise ConfigError(f"task: {len(images)} images with {len(labels)} labels in the split {split}.")
            x = torch.from_numpy(np.array(images))  # a copy: some sources are read-only
            x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
            self._data[split] = (x, torch.from_numpy(labels.astype(np.int64)))
        train = self._data["train"][0]
        # by histogram: no copy of the set in floating point
        counts = torch.stack([torch.bincount(train[:, c].flatten(), minlength=256) for c in range(train.shape[1])])
        share, values = counts / counts.sum(1, keepdim=True), torch.arange(256.0)
        mean = (share * values).sum(1)
        variance = (share * values.square()).sum(1) - mean.square()
        std = variance.sqrt().clamp_min(1e-6)
        self.in_chans = train.shape[1]
        height, width = train.shape[2:]
        self.image_size = (self.resize, self.resize) if self.resize is not None else (height, width)
        self._prepared = NormalisedImage(tuple(mean.tolist()), tuple(std.tolist()), self.image_size)

    def preprocessing(self) -> NormalisedImage:
        return self._prepared

    def size(self, split: str) -> int:
        return len(self._data[split][1])

    def labels(self, split: str) -> Tensor:
        return self._data[split][1]

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        images, labels = self._data[split]
        x = images[index]
        if train and self.randaugment is not None:
            x = rand_augment(x, self.randaugment, generator)
        x = x.float()
        if train:
            x = random_crop(x, self.crop_padding, generator)
            if self.flip:
                x = random_flip(x, generator)
        x = self._prepared.normalise(x)
        if train and self.erase:
            x = random_erase(x, self.erase, generator)
        return {"input": x, "target": labels[index], "index": index}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split in sorted(self._data):
            for tensor in self._data[split]:
                digest.update(f"{split}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


class Digits(MemoryImages, name="digits"):
    """scikit-learn's 1,797 real handwritten digits, 8x8 grey: 1,257 for training, 180 for validation, 360 for testing.

    Too small to rank good mixers; it is here because it needs no download and trains in seconds.
    """

    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        images, labels = (raw.images * 15.9375).round().astype(np.uint8), raw.target  # 0..16 to 0..255
        self.classes = [str(name) for name in raw.target_names]
        parts = stratified(labels, [1257, 180, 360])
        return {s: (images[i], labels[i]) for s, i in zip(("train", "val", "test"), parts, strict=True)}


def read_idx(path: Path) -> np.ndarray:
    """An array from a file in the IDX format of MNIST, gzipped or not.

    Raises:
        ConfigError: a file that is not in this format or is cut off.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            data = f.read()
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ConfigError(f"{path}: unreadable or cut off ({error}); delete it and fetch it again.") from error
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if zero != 0 or kind != 8 or values.size != int(np.prod(shape)):
        raise ConfigError(f"{path}: not an IDX file of bytes, or cut off; delete it and fetch it again.")
    return values.reshape(shape)


class FashionMnist(MemoryImages, name="fashion_mnist"):
    """Fashion-MNIST (arXiv:1708.07747), 28x28 grey: 55,000 / 5,000 / 10,000 images; the test split is the official one.

    The four files are looked for in `root`, else in the cache, then where Debian's package `dataset-fashion-mnist` puts
    them; what is not found is downloaded by torchvision into the cache.

    Args:
        root: folder that holds the files (`train-images-idx3-ubyte.gz`, ...); None looks as said above.
        common: see `MemoryImages`.
    """

    train_size = 55_000

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(self, *, root: str | None = None, **common: Unpack[MemoryOptions]) -> None:
        super().__init__(**common)
        self.root = root

    def _find(self) -> Path:
        def complete(folder: Path) -> bool:
            return all(any((folder / n).exists() for n in (name, name + ".gz")) for name in FASHION_FILES)

        if self.root is not None:
            for folder in (Path(self.root), Path(self.root) / "FashionMNIST" / "raw"):
                if complete(folder):
                    return folder
            raise ConfigError(f"task.root: {self.root} does not hold {', '.join(n + '.gz' for n in FASHION_FILES)}.")
        cached = cache_dir() / "FashionMNIST" / "raw"  # torchvision's layout
        for folder in (cached, DEBIAN_FASHION):
            if complete(folder):
                return folder
        from torchvision.datasets import FashionMNIST

        why = try_download(lambda: FashionMNIST(str(cache_dir()), download=True))
        if why is None and complete(cached):
            return cached
        raise ConfigError(
            f"task: Fashion-MNIST is neither in {cached} nor in {DEBIAN_FASHION}, and downloading it failed ({why}). "
            f"Install Debian's package dataset-fashion-mnist, or put {', '.join(n + '.gz' for n in FASHION_FILES)} "
            f"into {cached}, or say task.root=FOLDER."
        )

    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        folder = self._find()
        found = [folder / n if (folder / n).exists() else folder / (n + ".gz") for n in FASHION_FILES]
        images, labels, test_images, test_labels = (read_idx(path) for path in found)
        for path, array, count in zip(
            found, (images, labels, test_images, test_labels), (60_000,) * 2 + (10_000,) * 2, strict=True
        ):
            if len(array) != count:
                raise ConfigError(f"{path}: {len(array)} entries, not {count}.")
        self.classes = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
        val, train = stratified(labels, [5_000, self.train_size])
        return {
            "train": (images[train], labels[train]),
            "val": (images[val], labels[val]),
            "test": (test_images, test_labels),
        }


FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class FashionMnist10k(FashionMnist, name="fashion_mnist_10k"):
    """Fashion-MNIST with a fixed, class-balanced 10,000 of its training images; validation and test are the same."""

    train_size = 10_000


def try_download(download: object) -> str | None:
    """Run a download; returns None or why it failed."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        download()  # type: ignore[operator]
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision raises RuntimeError
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    finally:
        socket.setdefaulttimeout(before)
    return None


class Cifar10(MemoryImages, name="cifar10"):
    """CIFAR-10, 32x32 colour: 45,000 / 5,000 / 10,000 images; the test split is the official one.

    Args:
        root: folder that holds `cifar-10-batches-py`; None for the cache.
        download: let torchvision fetch it when it is not there.
        crop_padding, flip: as in `MemoryImages`, but on, the usual augmentation.
        common: see `MemoryImages`.
    """

    torchvision_name = "CIFAR10"
    folder = "cifar-10-batches-py"
    archive = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(
        self,
        *,
        root: str | None = None,
        download: bool = True,
        crop_padding: Count = 4,
        flip: bool = True,
        **common: Unpack[_WithoutMoves],
    ) -> None:
        super().__init__(crop_padding=crop_padding, flip=flip, **common)
        self.root, self.download = root, download

    def load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        import torchvision

        dataset = getattr(torchvision.datasets, self.torchvision_name)
        root = str(self.root or cache_dir())
        # torchvision checks the files' MD5 before it unpickles them
        why: str | None = "not asked to, task.download=false"
        try:
            dataset(root, train=True)
        except (RuntimeError, OSError) as error:
            if self.download:
                why = try_download(lambda: dataset(root, download=True))
            if why is not None:
                raise ConfigError(
                    f"task: {self.torchvision_name} is not in {root} and was not downloaded ({why}). Unpack "
                    f"{self.archive} there, so that {Path(root) / self.folder} exists, or say task.root=FOLDER."
                ) from error
        train, test = dataset(root, train=True), dataset(root, train=False)
        self.classes = list(train.classes)
        labels = np.array(train.targets)
        first, second = stratified(labels, [45_000, 5_000])
        return {
            "train": (train.data[first], labels[first]),
            "val": (train.data[second], labels[second]),
            "test": (test.data, np.array(test.targets)),
        }


class Cifar100(Cifar10, name="cifar100"):
    """CIFAR-100: as `Cifar10`, with 100 classes, in the folder `cifar-100-python`."""

    torchvision_name = "CIFAR100"
    folder = "cifar-100-python"
    archive = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"

"""Image sets on disk or on the Hugging Face hub, read through timm's dataset factory.

Axis letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..base import Batch
from .augment import seeded
from .classification import ImageClassification, check_fraction

# Up to this many files every one is decoded and hashed before training; larger sets are hashed by name and size, and a
# bad file shows when it is read.
VERIFY_LIMIT = 10_000
_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid", "eval")
_TEST = ("test",)


class StoredImages(ImageClassification):
    """Base of the image sets that are decoded file by file, with timm's transforms.

    A subclass gives `_reader`, which opens a split. Where there is no validation split, a tenth of the training images,
    fixed, is kept apart for it.

    Args:
        image_size: side H = W in pixels of what the model sees.
        crop_scale: smallest area of a random resized crop, as part of the image; 1 for no random crop.
        flip: mirror left to right at random.
        color_jitter: strength of brightness, contrast and saturation jitter; not used with `randaugment`.
        erase: probability of random erasing.
        randaugment: timm's policy, e.g. `rand-m9-mstd0.5-inc1`; None for none.
        label_smoothing, mixup, cutmix, mix_prob: see `ImageClassification`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_scale: float,
        flip: bool,
        color_jitter: float,
        erase: float,
        randaugment: str | None,
        label_smoothing: float,
        mixup: float,
        cutmix: float,
        mix_prob: float,
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix, mix_prob=mix_prob)
        if image_size < 1:
            raise ConfigError(f"task.image_size: {image_size!r} is not a positive number of pixels.")
        if not 0 < crop_scale <= 1:
            raise ConfigError(f"task.crop_scale: {crop_scale!r} is not in (0, 1].")
        from timm.data import create_transform

        self.image_size, self.in_chans = (image_size, image_size), 3
        shared: dict[str, Any] = {"input_size": (3, image_size, image_size), "interpolation": "bicubic"}
        try:
            self._train_transform = create_transform(
                **shared,
                is_training=True,
                scale=(crop_scale, 1.0),
                train_crop_mode="rrc" if crop_scale < 1 else "rkrc",
                hflip=0.5 if flip else 0.0,
                color_jitter=color_jitter or 0.0,
                auto_augment=randaugment,
                re_prob=check_fraction(erase, key="task.erase", below_one=False),
                re_mode="pixel",
            )
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ConfigError(f'task.randaugment: "{randaugment}" is not a policy of timm\'s RandAugment.') from error
        self._eval_transform = create_transform(**shared, is_training=False)
        self._readers: dict[str, tuple[Any, Tensor | None]] = {}

    def _open_splits(self) -> dict[str, Any]:
        """The readers of the splits that exist, "train" among them."""
        raise NotImplementedError

    def open(self) -> None:
        if self._readers:
            return
        readers = self._open_splits()
        for split, reader in readers.items():
            if len(reader) == 0:
                raise ConfigError(f"task: the split {split} is empty.")
        self._readers = {split: (reader, None) for split, reader in readers.items()}
        if "val" not in readers:
            total = len(readers["train"])
            if total < 2:
                raise ConfigError(f"task: {total} training image; too few to keep some apart for validation.")
            order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
            kept = max(1, total // 10)
            self._readers["val"] = (readers["train"], order[:kept].sort().values)
            self._readers["train"] = (readers["train"], order[kept:].sort().values)

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test") if s in self._readers)

    def size(self, split: str) -> int:
        reader, subset = self._readers[split]
        return len(reader) if subset is None else len(subset)

    def _sample(self, split: str, index: int) -> tuple[Any, int]:
        """An image (PIL, RGB) and its class."""
        from PIL import Image

        reader, subset = self._readers[split]
        number = index if subset is None else int(subset[index])
        try:
            source, label = reader[number]
            with Image.open(source) as image:
                return image.convert("RGB"), int(label)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = self._describe(reader, number)
            raise ConfigError(f"{name}: cannot be read as an image ({error}); replace or remove it.") from error

    @staticmethod
    def _describe(reader: Any, number: int) -> str:
        try:
            return str(reader.filename(number, absolute=True))
        except (AttributeError, NotImplementedError, TypeError, KeyError, AssertionError):
            return f"sample {number}"

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        transform: Any = self._train_transform if train else self._eval_transform
        images, labels = [], []
        with seeded(generator):
            for i in index.tolist():
                image, label = self._sample(split, i)
                images.append(transform(image))
                labels.append(label)
        return {"input": torch.stack(images), "target": torch.tensor(labels), "index": index}


class ImageFolder(StoredImages, name="imagefolder"):
    """A folder of images by class: `root/train/CLASS/*.jpg`, `root/val/CLASS/*.jpg`, optionally `root/test/...`.

    Without `root/train`, the classes stand in `root` itself. Sets of at most 10,000 files are decoded once before
    training, so that a broken file is reported at once.

    Args:
        root: the folder.
        num_classes: number of classes that must be there; None takes what is found.
        image_size, crop_scale, flip, color_jitter, erase, randaugment, label_smoothing, mixup, cutmix, mix_prob: as in
            `StoredImages`.
    """

    def __init__(
        self,
        *,
        root: str,
        num_classes: int | None = None,
        image_size: int = 224,
        crop_scale: float = 0.35,
        flip: bool = True,
        color_jitter: float = 0.3,
        erase: float = 0.0,
        randaugment: str | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            crop_scale=crop_scale,
            flip=flip,
            color_jitter=color_jitter,
            erase=erase,
            randaugment=randaugment,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            mix_prob=mix_prob,
        )
        self.root, self.num_classes = Path(root).expanduser(), num_classes

    def _open_splits(self) -> dict[str, Any]:
        if not self.root.is_dir():
            raise ConfigError(f"task.root: the folder {self.root} does not exist.")
        folders = {"train": self._folder(_TRAIN) or self.root, "val": self._folder(_VAL), "test": self._folder(_TEST)}
        if folders["train"] == self.root and (folders["val"] or folders["test"]):
            raise ConfigError(f"task.root: {self.root} has no folder named train.")
        readers = {split: self._open_folder(path) for split, path in folders.items() if path is not None}
        self.classes = sorted(readers["train"].class_to_idx, key=readers["train"].class_to_idx.__getitem__)
        for split, reader in readers.items():
            if set(reader.class_to_idx) != set(self.classes):
                odd = sorted(set(reader.class_to_idx) ^ set(self.classes))[:5]
                raise ConfigError(f"task.root: classes differ between {folders['train']} and {folders[split]}: {odd}.")
        if self.num_classes is not None and self.num_classes != len(self.classes):
            raise ConfigError(
                f"task.num_classes: {self.num_classes}, but {folders['train']} holds {len(self.classes)} classes."
            )
        self._hash(readers)
        return readers

    def _folder(self, names: tuple[str, ...]) -> Path | None:
        return next((self.root / name for name in names if (self.root / name).is_dir()), None)

    @staticmethod
    def _open_folder(path: Path) -> Any:
        from timm.data import create_dataset

        try:
            dataset: Any = create_dataset("", root=str(path), search_split=False)
        except RuntimeError as error:  # timm's way to say that there is no image
            raise ConfigError(f"task.root: no images in {path}; expected {path}/CLASS/IMAGE.jpg.") from error
        return dataset.reader

    def _hash(self, readers: dict[str, Any]) -> None:
        digest = hashlib.sha256()
        verify = sum(len(r.samples) for r in readers.values()) <= VERIFY_LIMIT

        def content(path: str) -> bytes:
            from PIL import Image

            try:
                with open(path, "rb") as f:
                    data = f.read()
                with Image.open(path) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ConfigError(f"{path}: cannot be read as an image ({error}); replace or remove it.") from error
            return hashlib.sha256(data).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for split, reader in sorted(readers.items()):
                paths = [str(path) for path, _ in reader.samples]
                for path, (_, label) in zip(paths, reader.samples, strict=True):
                    name = os.path.relpath(path, self.root).replace(os.sep, "/")
                    digest.update(f"{split}/{name} {label} {os.path.getsize(path)}\n".encode())
                if verify:
                    for inner in pool.map(content, paths):
                        digest.update(inner)
        self._fingerprint = digest.hexdigest()

    def fingerprint(self) -> str:
        """Of names, classes and sizes of all files; of their contents too where there are at most 10,000."""
        return self._fingerprint


class ImageNet(ImageFolder, name="imagenet"):
    """ImageNet-1k (ILSVRC 2012) as folders: `root/train/n01440764/*.JPEG`, `root/val/n01440764/*.JPEG`.

    As `ImageFolder`, with 1,000 classes and the recipe of PoolFormer (arXiv:2111.11418) as defaults.

    Args:
        root, num_classes, image_size, crop_scale, flip, color_jitter, erase, randaugment, label_smoothing, mixup,
            cutmix, mix_prob: as in `ImageFolder`.
    """

    def __init__(
        self,
        *,
        root: str,
        num_classes: int | None = 1000,
        image_size: int = 224,
        crop_scale: float = 0.08,
        flip: bool = True,
        color_jitter: float = 0.4,
        erase: float = 0.25,
        randaugment: str | None = "rand-m9-mstd0.5-inc1",
        label_smoothing: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_prob: float = 1.0,
    ) -> None:
        super().__init__(
            root=root,
            num_classes=num_classes,
            image_size=image_size,
            crop_scale=crop_scale,
            flip=flip,
            color_jitter=color_jitter,
            erase=erase,
            randaugment=randaugment,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            mix_prob=mix_prob,
        )


class HuggingFaceImages(StoredImages, name="hfds"):
    """An image set of the Hugging Face hub, or a saved copy of one, through timm's `hfds/` reader.

    Needs the package `datasets` (`pip install "mixerzoo[text]"`).

    Args:
        dataset: its name on the hub, e.g. `uoft-cs/cifar10`, or a folder that `datasets.load_dataset` reads.
        train_split, val_split, test_split: names of its splits; None where there is none.
        input_key, target_key: names of its columns.
        image_size, crop_scale, flip, color_jitter, erase, randaugment, label_smoothing, mixup: as in `StoredImages`.
    """

    def __init__(
        self,
        *,
        dataset: str,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        input_key: str = "image",
        target_key: str = "label",
        image_size: int = 224,
        crop_scale: float = 0.35,
        flip: bool = True,
        color_jitter: float = 0.3,
        erase: float = 0.0,
        randaugment: str | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            crop_scale=crop_scale,
            flip=flip,
            color_jitter=color_jitter,
            erase=erase,
            randaugment=randaugment,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=0.0,
            mix_prob=1.0,
        )
        self.dataset = dataset
        self.names = {"train": train_split, "val": val_split, "test": test_split}
        self.input_key, self.target_key = input_key, target_key

    def _open_splits(self) -> dict[str, Any]:
        from timm.data import create_dataset

        readers: dict[str, Any] = {}
        for split, name in self.names.items():
            if name is None:
                continue
            try:
                opened: Any = create_dataset(
                    f"hfds/{self.dataset}", split=name, input_key=self.input_key, target_key=self.target_key
                )
            except ImportError as error:
                raise ConfigError('task: hfds needs the package datasets: pip install "mixerzoo[text]".') from error
            except Exception as error:  # the hub's client raises errors of many libraries; the cause stays chained
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ConfigError(
                    f'task.dataset: the split "{name}" of "{self.dataset}" cannot be loaded ({reason}). '
                    "Without network, give a folder that holds a copy of it."
                ) from error
            readers[split] = opened.reader
        columns = readers["train"].dataset.features
        for key, column in (("input_key", self.input_key), ("target_key", self.target_key)):
            if column not in columns:
                raise ConfigError(f'task.{key}: no column "{column}" in {self.dataset}. Columns: {", ".join(columns)}.')
        names = getattr(columns[self.target_key], "names", None)
        if names is None:
            raise ConfigError(f'task.target_key: the column "{self.target_key}" is not a class label.')
        self.classes = list(names)
        return readers

    def fingerprint(self) -> str:
        """Of the fingerprints that `datasets` keeps of its tables, by split."""
        found = sorted((s, r.dataset._fingerprint) for s, (r, _) in self._readers.items())
        return hashlib.sha256(repr(found).encode()).hexdigest()

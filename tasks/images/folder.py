"""Image sets that are decoded file by file, with timm's transforms; those in folders by class.

Axis letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Annotated, Any, Protocol, Unpack

import torch
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...schema import Between, Fraction, Probability, Share, Size
from ..base import Batch
from ..folders import LeftOut, class_files, same_classes, split_folders
from .augment import seeded
from .classification import ImageClassification, MixOptions
from .decode import UNREADABLE, image_suffixes, peculiarities, read_image, to_rgb
from .preprocessing import TimmImage

# Up to this many files every one is decoded and hashed before training. Of a larger set all names and sizes are hashed
# and the contents of a sample, and a bad file outside of it shows when it is read.
VERIFY_LIMIT = 10_000
_SAMPLE = 1_000


class Reader(Protocol):
    """A split as timm's readers give it: an open file and a class by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]: ...


class Files:
    """The reader of a split in folders.

    Args:
        folder: of the split.
        found: class -> its files.
        classes: names, in the order of their numbers.
    """

    def __init__(self, folder: Path, found: Mapping[str, Sequence[Path]], classes: Sequence[str]) -> None:
        self.folder = folder
        pairs = [(path, label) for label, name in enumerate(classes) for path in found[name]]
        self.samples = sorted(pairs, key=lambda pair: _natural(os.path.relpath(pair[0], folder)))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def name(self, index: int) -> str:
        """Of a sample, relative to the split's folder."""
        return os.path.relpath(self.samples[index][0], self.folder).replace(os.sep, "/")

    def filename(self, index: int, absolute: bool = False) -> str:
        """As timm's readers have it."""
        return str(self.samples[index][0]) if absolute else self.name(index)


def _natural(name: str) -> tuple[Any, str]:
    from timm.utils import natural_key

    return natural_key(name), name


class StoredOptions(MixOptions, total=False):
    """What all sets of image files take; see `StoredImages`."""

    image_size: Size
    crop_scale: Share
    flip: bool
    color_jitter: Annotated[float, Between(0, 10)]
    erase: Fraction
    randaugment: str | None


class StoredImages(ImageClassification):
    """Base of the image sets that are decoded file by file, with timm's transforms.

    Every image becomes 8-bit RGB as `decode` says: turned by its EXIF orientation, 16 bits scaled to 8, palettes looked
    up, alpha dropped. A subclass gives `_open_splits`. Where there is no validation split, a tenth of the training
    images, fixed, is kept apart for it.

    Args:
        image_size: side H = W in pixels of what the model sees.
        crop_scale: smallest area of a random resized crop, as part of the image; 1 for no random crop.
        flip: mirror left to right at random.
        color_jitter: strength of brightness, contrast and saturation jitter; not used with `randaugment`.
        erase: probability of random erasing.
        randaugment: timm's policy, e.g. `rand-m9-mstd0.5-inc1`; None for none.
        mixing: see `ImageClassification`.
    """

    def __init__(
        self,
        *,
        image_size: Size = 224,
        crop_scale: Share = 0.35,
        flip: bool = True,
        color_jitter: Annotated[float, Between(0, 10)] = 0.3,
        erase: Fraction = 0.0,
        randaugment: str | None = None,
        **mixing: Unpack[MixOptions],
    ) -> None:
        super().__init__(**mixing)
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
                re_prob=erase,
                re_mode="pixel",
            )
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise OptionError("randaugment", f'"{randaugment}" is not a policy of timm\'s RandAugment.') from error
        self._prepared = TimmImage(image_size)
        self._readers: dict[str, tuple[Any, Tensor | None]] = {}
        self._notes: list[str] = []
        self._fingerprint = ""

    def _open_splits(self) -> dict[str, Reader]:
        """The readers of the splits that exist, "train" among them."""
        raise NotImplementedError

    def open(self) -> None:
        if self._readers:
            return
        readers = self._open_splits()
        for split, reader in readers.items():
            if len(reader) == 0:
                raise ConfigError(f"task: the split {split} is empty.")
        self._inspect(readers)
        self._readers = {split: (reader, None) for split, reader in readers.items()}
        if "val" not in readers:
            total = len(readers["train"])
            if total < 2:
                raise ConfigError(f"task: {total} training image; too few to keep some apart for validation.")
            order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
            kept = max(1, total // 10)
            self._readers["val"] = (readers["train"], order[:kept].sort().values)
            self._readers["train"] = (readers["train"], order[kept:].sort().values)

    def preprocessing(self) -> TimmImage:
        return self._prepared

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test") if s in self._readers)

    def size(self, split: str) -> int:
        reader, subset = self._readers[split]
        return len(reader) if subset is None else len(subset)

    def _sample(self, split: str, index: int) -> tuple[Any, int]:
        """An image (PIL, RGB) and its class."""
        reader, subset = self._readers[split]
        number = index if subset is None else int(subset[index])
        try:
            source, label = reader[number]
            with contextlib.closing(source):
                return read_image(source), int(label)
        except UNREADABLE as error:
            raise self._unreadable(reader, number, error) from error

    def _look(self, reader: Reader, number: int, *, decode: bool) -> tuple[bytes, int, list[str]]:
        """SHA-256 of a file, its class, and what is particular about the image.

        With `decode` an image that cannot be read is an error; without, it shows when its turn comes.
        """
        from PIL import Image

        try:
            source, label = reader[number]
            with contextlib.closing(source):
                data = source.read()
        except OSError as error:
            raise self._unreadable(reader, number, error) from error
        found: list[str] = []
        try:
            with Image.open(io.BytesIO(data)) as image:
                found = peculiarities(image)
                if decode:
                    to_rgb(image)
        except UNREADABLE as error:
            if decode:
                raise self._unreadable(reader, number, error) from error
        return hashlib.sha256(data).digest(), int(label), found

    def _inspect(self, readers: Mapping[str, Reader]) -> None:
        """Decode and hash the images, or of a large set a sample; sets the fingerprint and the notes."""
        total = sum(map(len, readers.values()))
        digest, odd = hashlib.sha256(), Counter[str]()
        where: dict[bytes, dict[str, str]] = {}
        looked = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for split, reader in sorted(readers.items()):
                numbers = range(len(reader))
                if total > VERIFY_LIMIT:
                    self._hash_outlines(reader, split, digest)
                    numbers = numbers[:: -(-total // _SAMPLE)]
                look = functools.partial(self._look, reader, decode=total <= VERIFY_LIMIT)
                found = pool.map(look, numbers)
                for number, (content, label, particular) in zip(numbers, found, strict=True):
                    digest.update(f"{split}/{self._stable_name(reader, number)} {label}\n".encode() + content)
                    odd.update(particular)
                    where.setdefault(content, {}).setdefault(split, self._describe(reader, number))
                    looked += 1
        self._fingerprint = digest.hexdigest()
        of = f"of {looked:,} images" + (f" looked at, {total:,} in all" if looked < total else "")
        self._notes += [f"{count:,} {of} {what}" for what, count in odd.items()]
        shared = [places for places in where.values() if len(places) > 1]
        if shared:
            first = " and ".join(shared[0].values())
            self._notes.append(f"warning: {len(shared):,} {of} are in more than one split, such as {first}")

    def _hash_outlines(self, reader: Any, split: str, digest: Any) -> None:
        """Hash what tells the samples of a large set apart without reading all images."""

    @staticmethod
    def _stable_name(reader: Any, number: int) -> str:
        """A name of a sample that does not depend on where the set lies."""
        return str(number)

    def notes(self) -> list[str]:
        return [*super().notes(), *self._notes]

    def fingerprint(self) -> str:
        """Of names, classes and contents of all images; of more than 10,000, of the contents of a fixed thousand."""
        return self._fingerprint

    def _unreadable(self, reader: Any, number: int, error: Exception) -> ConfigError:
        name = self._describe(reader, number)
        return ConfigError(f"{name}: cannot be read as an image ({error}); replace or remove it.")

    @staticmethod
    def _describe(reader: Any, number: int) -> str:
        try:
            return str(reader.filename(number, absolute=True))
        except (AttributeError, NotImplementedError, TypeError, KeyError, AssertionError):
            return f"sample {number}"

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        transform: Any = self._train_transform if train else self._prepared.transform
        images, labels = [], []
        with seeded(generator):
            for i in index.tolist():
                image, label = self._sample(split, i)
                images.append(transform(image))
                labels.append(label)
        return {"input": torch.stack(images), "target": torch.tensor(labels), "index": index}


class ImageFolder(StoredImages, name="imagefolder"):
    """A folder of images by class: `root/train/CLASS/*`, `root/val/CLASS/*`, optionally `root/test/...`.

    Split folders are found by the usual names, without case: training, valid, validation, dev, testing, test_set, ...
    Without any the classes stand in `root` itself. A class has all files below its folder of a format that Pillow
    decodes; hidden names are passed over, and an image outside of all classes is an error. The run's log shows the
    classes with their counts, what was left out and why, and images that are in two splits.

    Sets of at most 10,000 files are decoded once before training, so that a broken file is reported at once.

    Args:
        root: the folder.
        num_classes: number of classes that must be there; None takes what is found.
        common: see `StoredImages`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        from PIL import Image

        for split, count in (("train", 6), ("val", 3), ("test", 3)):
            for shade, name in ((40, "a"), (200, "b")):
                (folder / split / name).mkdir(parents=True)
                for i in range(count):
                    Image.new("RGB", (24 + i, 20), (shade, 20 * i, len(split))).save(folder / split / name / f"{i}.png")
        return {"root": str(folder), "image_size": 16}

    def __init__(self, *, root: str, num_classes: Size | None = None, **common: Unpack[StoredOptions]) -> None:
        super().__init__(**common)
        self.root, self.num_classes = Path(root).expanduser(), num_classes

    def _open_splits(self) -> dict[str, Reader]:
        left, suffixes = LeftOut(), image_suffixes()
        given = {"key": "task.root", "what": "image"}
        folders = split_folders(self.root, suffixes, left, **given) or {"train": self.root}
        found = {split: class_files(path, suffixes, left, **given) for split, path in folders.items()}
        self.classes = sorted(found["train"], key=_natural)
        same_classes(self.classes, folders, found, key="task.root")
        if self.num_classes is not None and self.num_classes != len(self.classes):
            raise ConfigError(
                f"task.num_classes: {self.num_classes}, but {folders['train']} holds {len(self.classes)} classes."
            )
        self._notes = left.lines()
        return {split: Files(path, found[split], self.classes) for split, path in folders.items()}

    @staticmethod
    def _stable_name(reader: Any, number: int) -> str:
        return reader.name(number)

    def _hash_outlines(self, reader: Any, split: str, digest: Any) -> None:
        for number, (path, label) in enumerate(reader.samples):
            digest.update(f"{split}/{reader.name(number)} {label} {os.path.getsize(path)}\n".encode())

    def labels(self, split: str) -> Tensor:
        reader, subset = self._readers[split]
        labels = torch.tensor([label for _, label in reader.samples])
        return labels if subset is None else labels[subset]


class ImageNet(ImageFolder, name="imagenet"):
    """ImageNet-1k (ILSVRC 2012) as folders: `root/train/n01440764/*.JPEG`, `root/val/n01440764/*.JPEG`.

    As `ImageFolder`, with 1,000 classes and the recipe of PoolFormer (arXiv:2111.11418) as defaults.

    Args:
        root, num_classes, image_size, crop_scale, flip, color_jitter, erase, randaugment, label_smoothing, mixup,
            cutmix, mix_prob: as in `ImageFolder`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(
        self,
        *,
        root: str,
        num_classes: Size | None = 1000,
        image_size: Size = 224,
        crop_scale: Share = 0.08,
        flip: bool = True,
        color_jitter: Annotated[float, Between(0, 10)] = 0.4,
        erase: Fraction = 0.25,
        randaugment: str | None = "rand-m9-mstd0.5-inc1",
        label_smoothing: Probability = 0.1,
        mixup: Annotated[float, Between(0, 100)] = 0.8,
        cutmix: Annotated[float, Between(0, 100)] = 1.0,
        mix_prob: Fraction = 1.0,
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

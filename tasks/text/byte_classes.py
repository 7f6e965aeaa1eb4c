"""Classification of texts by their bytes, as the Long Range Arena does it. Tay et al. (2020), arXiv:2011.04006.

Axis letters: B batch, N bytes of a text.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...schema import Size
from ..base import Batch
from ..folders import LeftOut, class_files, is_hidden, same_classes, split_folders
from ..sequence.preprocessing import Bytes
from ..sequence.sequence import SequenceClassification
from .corpora import TEXT_SUFFIXES, hub_column, king_james, load_hub, read_files, split_of

Labelled = list[tuple[bytes, int]]

# Where the sections of the King James Bible begin, by the first book's short name.
_SECTIONS = {
    "Ge": "law",
    "Josh": "history",
    "Job": "poetry",
    "Isa": "major prophets",
    "Hos": "minor prophets",
    "Mat": "gospels and acts",
    "Rom": "letters of Paul",
    "Heb": "other letters and revelation",
}


class ByteClasses(SequenceClassification):
    """Base of the tasks that classify texts: the ids are the bytes, V = 256; padding is the byte 0, on the right.

    Longer texts are cut after `max_bytes`. Loss and accuracy are taken once per text.

    A subclass gives `load`, which sets `classes`.

    Args:
        max_bytes: N.
        use_mask: tell the model which tokens are padding; otherwise every text is padded to N.
    """

    vocab_size = 256

    def __init__(self, *, max_bytes: int, use_mask: bool) -> None:
        self.sequence_length = max_bytes
        self.use_mask = use_mask
        self._data: dict[str, Labelled] = {}
        self._notes: list[str] = []

    def load(self) -> dict[str, Labelled]:
        """Texts with the numbers of their classes, for "train", "val" and maybe "test"."""
        raise NotImplementedError

    def open(self) -> None:
        if self._data:
            return
        found = {
            split: [(text[: self.sequence_length], label) for text, label in rows if text]
            for split, rows in self.load().items()
        }
        for split, rows in found.items():
            if not rows:
                raise ConfigError(f"task: the split {split} holds no text.")
        if len(self.classes) < 2:
            raise ConfigError(f"task: there is only one class, {self.classes}.")
        self._data = found

    def preprocessing(self) -> Bytes:
        return Bytes(self.vocab_size, self.sequence_length, self.use_mask)

    def splits(self) -> tuple[str, ...]:
        return tuple(self._data)

    def size(self, split: str) -> int:
        return len(self._data[split])

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        rows = [self._data[split][i] for i in index.tolist()]
        return {
            **self.pad([np.frombuffer(text, np.uint8) for text, _ in rows], padding=0, masked=self.use_mask),
            "target": torch.tensor([label for _, label in rows]),
            "index": index,
        }

    def labels(self, split: str) -> Tensor:
        return torch.tensor([label for _, label in self._data[split]])

    def notes(self) -> list[str]:
        return [*super().notes(), *self._notes]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split, rows in sorted(self._data.items()):
            for text, label in rows:
                digest.update(f"{split} {label} {len(text)} ".encode())
                digest.update(text)
        return digest.hexdigest()


class KingJamesSections(ByteClasses, name="kjv_sections"):
    """Which of eight sections of the King James Bible a passage is from, from law to the last letters.

    The text is that of Debian's package `bible-kjv`. A passage is as many whole verses of one chapter, one after
    another, as fit into `max_bytes`. A hash of the chapter's name decides its split: about 90% / 5% / 5%.

    Args:
        max_bytes, use_mask: see `ByteClasses`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(self, *, max_bytes: Size = 512, use_mask: bool = True) -> None:
        super().__init__(max_bytes=max_bytes, use_mask=use_mask)

    def load(self) -> dict[str, Labelled]:
        self.classes = list(_SECTIONS.values())
        section, found = -1, {"train": [], "val": [], "test": []}
        for name, content in king_james():
            book = name.rstrip("0123456789")
            if book in _SECTIONS:
                section = list(_SECTIONS).index(book)
            passages = [b""]
            for verse in content.splitlines(keepends=True):
                if passages[-1] and len(passages[-1]) + len(verse) > self.sequence_length:
                    passages.append(b"")
                passages[-1] += verse
            found[split_of(name)] += [(passage, section) for passage in passages]
        return found


class FolderClasses(ByteClasses, name="text_folder"):
    """Texts in folders by class: `root/train/CLASS/*.txt` and `root/val/CLASS/*.txt`, maybe `root/test/...`.

    Split folders are found by the usual names, without case: training, valid, dev, testing, ... Without these folders,
    `root/CLASS/*.txt`, where a hash of a file's path decides its split: about 90% / 5% / 5%. Hidden names are passed
    over, and a text outside of all classes is an error. The run's log shows the classes with their counts, what was
    left out and why.

    Args:
        root: the folder.
        suffixes: of the files that count.
        max_bytes, use_mask: see `ByteClasses`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        for split, count in (("train", 6), ("val", 3), ("test", 3)):
            for name in ("a", "b"):
                (folder / split / name).mkdir(parents=True)
                for i in range(count):
                    (folder / split / name / f"{i}.txt").write_text(f"{split} {name} " * (i + 1))
        return {"root": str(folder), "max_bytes": 48}

    def __init__(
        self,
        *,
        root: str,
        suffixes: list[str] = list(TEXT_SUFFIXES),  # noqa: B006 - read only
        max_bytes: Size = 1024,
        use_mask: bool = True,
    ) -> None:
        super().__init__(max_bytes=max_bytes, use_mask=use_mask)
        self.root, self.suffixes = Path(root).expanduser(), tuple(s.lower() for s in suffixes)

    def load(self) -> dict[str, Labelled]:
        if not self.root.is_dir():
            raise ConfigError(f"task.root: there is no folder {self.root}.")
        left = LeftOut()
        given = {"key": "task.root", "what": "text"}
        parts = split_folders(self.root, self.suffixes, left, **given)
        for needed in ("train", "val"):
            if parts and needed not in parts:
                raise ConfigError(f"task.root: {self.root} has {', '.join(parts)}, but no folder {needed}.")
        folders = parts or {"train": self.root}
        if not any(p.is_dir() and not is_hidden(p.name) for p in folders["train"].iterdir()):
            raise ConfigError(f"task.root: {folders['train']} holds no folders, one for each class.")
        found = {split: class_files(path, self.suffixes, left, **given) for split, path in folders.items()}
        self.classes = sorted(found["train"])
        same_classes(self.classes, folders, found, key="task.root")
        read: dict[str, Labelled] = {"train": [], "val": [], "test": []}
        for split, folder in folders.items():
            for label, name in enumerate(self.classes):
                for document in read_files(sorted(found[split][name]), folder, key="task.root", left=left):
                    where = split if parts else split_of(document.name)
                    read[where].append((document.content, label))
        self._notes = left.lines()
        return {split: rows for split, rows in read.items() if rows or not parts}


class HubClasses(ByteClasses, name="hf_text_classes"):
    """A labelled text data set of the Hugging Face hub; by default IMDB, which the Long Range Arena takes.

    Needs the package `datasets` (`pip install "mixerzoo[text]"`).

    Args:
        dataset: its name on the hub, or a folder that `datasets.load_dataset` reads.
        config: its configuration.
        text_key, label_key: columns of the texts and of the labels, which are integers from 0 on.
        train_split, val_split, test_split: its splits. Without `val_split` a hash of the row's number keeps about
            10% of the training texts apart for validation. `test_split` may be None.
        max_bytes, use_mask: see `ByteClasses`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(
        self,
        *,
        dataset: str = "stanfordnlp/imdb",
        config: str | None = None,
        text_key: str = "text",
        label_key: str = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        max_bytes: Size = 4096,
        use_mask: bool = True,
    ) -> None:
        super().__init__(max_bytes=max_bytes, use_mask=use_mask)
        self.dataset, self.config, self.text_key, self.label_key = dataset, config, text_key, label_key
        self.named = {"train": train_split, "val": val_split, "test": test_split}
        self._names: list[str] = []  # of the classes, where the set has them

    def _read(self, split: str) -> Labelled:
        table = load_hub(self.dataset, self.config, split)
        column = (getattr(table, "features", None) or {}).get(self.label_key)
        self._names = list(getattr(column, "names", None) or self._names)
        texts = hub_column(table, self.text_key, key="task.text_key")
        labels = hub_column(table, self.label_key, key="task.label_key")
        for row, label in enumerate(labels):
            if not isinstance(label, int) or label < 0:
                raise ConfigError(f"task.label_key: row {row} of {split} has the label {label!r}, not a class number.")
        return [(text.encode(), label) for text, label in zip(texts, labels, strict=True)]

    def load(self) -> dict[str, Labelled]:
        found = {split: self._read(name) for split, name in self.named.items() if name is not None}
        if "val" not in found:
            kept_apart = [split_of(str(i)) != "train" for i in range(len(found["train"]))]
            rows = list(zip(found["train"], kept_apart, strict=True))
            found = {**found, "train": [r for r, apart in rows if not apart], "val": [r for r, apart in rows if apart]}
        number = 1 + max((label for rows in found.values() for _, label in rows), default=0)
        self.classes = self._names or [str(i) for i in range(number)]
        if len(self.classes) < number:
            raise ConfigError(f"task.label_key: a label of {number - 1} with names of {len(self.classes)} classes.")
        return found

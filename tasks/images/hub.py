"""Image sets of the Hugging Face hub, read through timm's dataset factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from ...errors import ConfigError
from .folder import Reader, StoredImages, StoredOptions


class HuggingFaceImages(StoredImages, name="hfds"):
    """An image set of the Hugging Face hub, or a saved copy of one, through timm's `hfds/` reader.

    Needs the package `datasets` (`pip install "mixerzoo[text]"`).

    Args:
        dataset: its name on the hub, e.g. `uoft-cs/cifar10`, or a folder that `datasets.load_dataset` reads.
        train_split, val_split, test_split: names of its splits; None where there is none.
        input_key, target_key: names of its columns.
        common: see `StoredImages`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(
        self,
        *,
        dataset: str,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        input_key: str = "image",
        target_key: str = "label",
        **common: Unpack[StoredOptions],
    ) -> None:
        super().__init__(**common)
        self.dataset = dataset
        self.names = {"train": train_split, "val": val_split, "test": test_split}
        self.input_key, self.target_key = input_key, target_key

    def _open_splits(self) -> dict[str, Reader]:
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

    def _hash_outlines(self, reader: Any, split: str, digest: Any) -> None:
        digest.update(f"{split} {list(reader.dataset[self.target_key])}".encode())

    def labels(self, split: str) -> Tensor:
        reader, subset = self._readers[split]
        labels = torch.tensor(list(reader.dataset[self.target_key]))
        return labels if subset is None else labels[subset]

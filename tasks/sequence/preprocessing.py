"""Sequences as the tasks over tokens evaluate them: ids, symbols, grey pixels, bytes of text.

Axis letters: B batch, N tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ..images.preprocessing import as_rgb
from ..preprocessing import Preprocessing


def pad_right(rows: Sequence[Any], *, length: int, padding: int, masked: bool) -> dict[str, Tensor]:
    """Sequences of ids as one batch: `"input"` (B, N) int64 and, where `masked`, `"mask"` (B, N).

    Args:
        rows: B sequences.
        length: N without a mask; with one, N is that of the longest row.
        padding: id that stands behind the end of a shorter row.
        masked: tell which tokens are real.
    """
    longest = max(map(len, rows)) if masked else length
    ids = np.full((len(rows), longest), padding, np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    found = {"input": torch.from_numpy(ids)}
    if masked:
        found["mask"] = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return found


@dataclass(frozen=True)
class Ids(Preprocessing, name="ids"):
    """Token ids as they are.

    Attributes:
        vocab_size: ids are below it.
        length: longest sequence, where longer ones are cut; None for no end.
        masked: whether a batch of shorter sequences is padded with a mask; otherwise sequences are padded to `length`,
            as the model has learned to read them.
        padding: id of the padding.
    """

    vocab_size: int
    length: int | None = None
    masked: bool = True
    padding: int = 0

    def encode(self, sample: Any) -> np.ndarray:
        """The ids (N,) of a sample, int64, not yet cut."""
        ids = np.asarray(sample)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ConfigError(f"ids: a sample is a sequence of whole numbers, not {ids.dtype} of shape {ids.shape}.")
        return ids.astype(np.int64)

    def __call__(self, sample: Any) -> Tensor:
        """(N,) int64; one that is to have all its `length` tokens is padded to it."""
        ids = self._cut(sample)
        if self.masked or self.length is None:
            return torch.from_numpy(ids)
        return pad_right([ids], length=self.length, padding=self.padding, masked=False)["input"][0]

    def _cut(self, sample: Any) -> np.ndarray:
        ids = self.encode(sample)[: self.length]
        if not len(ids):
            raise ConfigError("ids: an empty sequence.")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ConfigError(f"ids: {ids.min()} to {ids.max()} are not all in [0, {self.vocab_size}).")
        return ids

    def batch(self, samples: Iterable[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [self._cut(sample) for sample in samples]
        if self.length is None:  # next tokens: nothing is padded that need not be
            lengths = {len(row) for row in rows}
            found = pad_right(rows, length=max(lengths), padding=self.padding, masked=len(lengths) > 1)
        else:
            found = pad_right(rows, length=self.length, padding=self.padding, masked=self.masked)
        return found.pop("input"), found


@dataclass(frozen=True)
class Bytes(Ids, name="bytes"):
    """The bytes of text in UTF-8; attributes as of `Ids`."""

    def encode(self, sample: Any) -> np.ndarray:
        if not isinstance(sample, (str, bytes)):
            raise ConfigError(f"text: {type(sample).__name__} is neither str nor bytes.")
        return np.frombuffer(sample.encode() if isinstance(sample, str) else sample, np.uint8).astype(np.int64)

    def decode(self, ids: Any) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD, and ids above 255 are left out."""
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class Symbols(Ids, name="symbols"):
    """Words with spaces between them, from a fixed list.

    Attributes:
        symbols: the word of every id.
        vocab_size, length, masked, padding: as of `Ids`.
    """

    symbols: tuple[str, ...] = ()

    def encode(self, sample: Any) -> np.ndarray:
        places = {symbol: i for i, symbol in enumerate(self.symbols) if symbol}
        words = str(sample).split()
        unknown = [word for word in words if word not in places]
        if unknown:
            raise ConfigError(f'text: "{unknown[0]}" is not a symbol. Allowed: {" ".join(places)}.')
        return np.array([places[word] for word in words], np.int64)

    def decode(self, ids: Any) -> str:
        """The words of the ids, without padding."""
        return " ".join(word for i in np.asarray(ids).tolist() if (word := self.symbols[i]))


@dataclass(frozen=True)
class GreyPixels(Ids, name="pixels"):
    """The grey pixels of an image, row by row; `vocab_size` levels of grey.

    Attributes:
        image_size: H, W; other images are refused.
        vocab_size, length, masked, padding: as of `Ids`.
    """

    image_size: tuple[int, int] = (0, 0)

    @staticmethod
    def levels(images: np.ndarray, levels: int) -> np.ndarray:
        """Images (B, H, W), or (B, H, W, 3) turned to grey, of bytes to their levels, uint8, of the same shape."""
        grey = images if images.ndim == 3 else images @ np.array([0.299, 0.587, 0.114])
        return (np.round(grey).astype(np.int64) * levels // 256).astype(np.uint8)

    def encode(self, sample: Any) -> np.ndarray:
        grey = isinstance(sample, (np.ndarray, Tensor)) and sample.ndim == 2
        image = np.asarray(sample if grey else as_rgb(sample), np.uint8)
        if image.shape[:2] != self.image_size:
            raise ConfigError(f"image: {image.shape[:2]} is not {self.image_size}: height, width.")
        return self.levels(image[None], self.vocab_size).reshape(-1).astype(np.int64)

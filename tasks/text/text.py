"""Language modelling: the next byte of text, or the next token of a memory-mapped file.

Axis letters: B windows of a batch, N tokens of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...schema import AtLeast, Probability, Size
from ..base import Batch
from ..folders import LeftOut
from ..sequence.preprocessing import Bytes
from ..sequence.sequence import IGNORE, RandomState, TokenPrediction
from .corpora import (
    TEXT_SUFFIXES,
    Document,
    hub_column,
    in_hash_order,
    king_james,
    load_hub,
    python_sources,
    read_path,
    split_of,
)

Splits = dict[str, np.ndarray]

# Every document ends with this byte, which text does not hold.
END = 0
# Files of tokens up to this size are hashed whole, larger ones by size and 256 samples of 1 MiB.
_HASH_LIMIT = 2**30
_PIECE = 2**20


class WindowOptions(TypedDict, total=False):
    """What all tasks over windows take, but for the length; see `Windows`."""

    eval_stride: Size | None
    packed: bool
    objective: Literal["causal_lm", "masked_lm"]
    mask_fraction: Probability


class ByteOptions(WindowOptions, total=False):
    """What all tasks over bytes take; see `ByteText`."""

    sequence_length: Size
    eval_bytes: Annotated[int, AtLeast(2)] | None


class Windows(TokenPrediction):
    """Base of the tasks over streams of tokens: a split is one array of ids, a sample is a window of it.

    Next token (`objective="causal_lm"`): loss and accuracy are taken at every position of a window; the target is the
    token that follows. In training, a window begins at a random place near its number times N, so that over the epochs
    every alignment comes; an epoch sees each token about once. In validation and test, windows lie at fixed places and
    every token of the split but the first is predicted exactly once; `eval_stride` < N lets windows overlap, so that
    all tokens but those of the first window have at least N - `eval_stride` + 1 tokens before them.

    Masked tokens (`objective="masked_lm"`, BERT, arXiv:1810.04805): a share of the positions is chosen; of these 80%
    show the extra id V - 1, 10% a random token, 10% the token itself. Loss and accuracy are taken at the chosen
    positions; in validation and test they depend on the window's number alone.

    A subclass gives `load`, and sets `tokens_in_data`, the number of ids of the data.

    Args:
        sequence_length: N.
        eval_stride: distance between windows of validation and test; None for N.
        packed: tell the model where documents begin (`document_ids`), so that nothing crosses; then the first token of
            a document is no target.
        objective: "causal_lm" or "masked_lm".
        mask_fraction: share of the positions chosen for "masked_lm".
    """

    separator: int | None = None
    tokens_in_data: int

    def __init__(
        self,
        *,
        sequence_length: Size,
        eval_stride: Size | None = None,
        packed: bool = False,
        objective: Literal["causal_lm", "masked_lm"] = "causal_lm",
        mask_fraction: Probability = 0.15,
    ) -> None:
        self.sequence_length = sequence_length
        self.eval_stride = sequence_length if eval_stride is None else eval_stride
        if self.eval_stride > sequence_length:
            raise OptionError("eval_stride", f"{eval_stride} is more than sequence_length={sequence_length}.")
        if packed and objective == "masked_lm":
            raise OptionError("packed", "not with objective=masked_lm.")
        self.packed, self.objective = packed, objective  # type: ignore[misc]
        self.mask_fraction = mask_fraction
        if objective == "masked_lm" and not mask_fraction:
            raise OptionError("mask_fraction", "0 leaves nothing to predict.")
        self._streams: Splits = {}

    def load(self) -> Splits:
        """One array of ids per split: "train", "val" and maybe "test"."""
        raise NotImplementedError

    def open(self) -> None:
        if self._streams:
            return
        streams = self.load()
        for split, stream in streams.items():
            if len(stream) <= self.sequence_length:
                raise ConfigError(
                    f"task.sequence_length: the split {split} has {len(stream):,} tokens; a window of "
                    f"{self.sequence_length} and its last target need at least {self.sequence_length + 1:,}."
                )
        self._streams = streams
        self.vocab_size = self.tokens_in_data + (1 if self.objective == "masked_lm" else 0)

    def stream(self, split: str) -> np.ndarray:
        """All tokens of a split, one after another."""
        return self._streams[split]

    def splits(self) -> tuple[str, ...]:
        return tuple(self._streams)

    def size(self, split: str) -> int:
        targets = len(self._streams[split]) - 1
        if split == "train":
            return targets // self.sequence_length
        return 1 + math.ceil((targets - self.sequence_length) / self.eval_stride)

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        stream, length = self._streams[split], self.sequence_length
        begin = index * (length if split == "train" else self.eval_stride)
        if train:
            begin = begin + torch.randint(length, index.shape, generator=generator)
        last = len(stream) - 1 - length  # the last window ends with the split and overlaps the one before
        batch = self._cut(stream, begin.clamp_max(last), index)
        if split != "train":
            counted_before = (begin - self.eval_stride + length)[:, None]
            places = begin.clamp_max(last)[:, None] + torch.arange(length)
            repeated = (places < counted_before) & (index > 0)[:, None]
            batch["target"] = batch["target"].masked_fill(repeated, IGNORE)
        if self.objective == "masked_lm":
            return self._masked(batch, generator if train else None)
        return batch

    def _cut(self, stream: np.ndarray, begin: Tensor, index: Tensor) -> Batch:
        places = begin[:, None] + torch.arange(self.sequence_length + 1)
        tokens = torch.from_numpy(stream[places.numpy()].astype(np.int64))
        self.check(tokens, begin)
        batch = {"input": tokens[:, :-1], "target": tokens[:, 1:], "index": index}
        if self.packed:
            ends = batch["input"] == self.separator
            batch["document_ids"] = ends.long().cumsum(1) - ends.long()
            batch["target"] = batch["target"].masked_fill(ends, IGNORE)
        return batch

    def check(self, tokens: Tensor, begin: Tensor) -> None:
        """Hold a batch's tokens (B, N + 1), read from the places `begin` (B,) on, against what the data should hold."""

    def _masked(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        """The other objective, from the windows of the first: a position that counted there may be chosen here."""
        ids, real = batch["input"], batch["target"] != IGNORE
        if generator is None:
            rows = [RandomState([17, n]).random_sample((3, ids.shape[1])) for n in batch["index"].tolist()]
            chance, kind, other = torch.from_numpy(np.stack(rows, 1))
        else:
            chance, kind, other = torch.rand(3, *ids.shape, generator=generator)
        chance = chance.masked_fill(~real, 2.0)
        smallest = chance.min(1, keepdim=True).values  # a window always has a chosen position
        chosen = real & (chance <= smallest.clamp_min(self.mask_fraction))
        random = (other * self.tokens_in_data).long().clamp_max(self.tokens_in_data - 1)
        shown = torch.where(kind < 0.8, self.vocab_size - 1, torch.where(kind < 0.9, random, ids))
        target = ids.masked_fill(~chosen, IGNORE)
        return {**batch, "input": torch.where(chosen, shown, ids), "target": target}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split, stream in sorted(self._streams.items()):
            digest.update(f"{split}{stream.shape}{stream.dtype.str}".encode())
            if stream.nbytes <= _HASH_LIMIT:
                digest.update(np.ascontiguousarray(stream).data)
                continue
            piece = _PIECE // stream.itemsize
            for start in np.linspace(0, len(stream) - piece, 256).astype(np.int64):
                digest.update(np.ascontiguousarray(stream[start : start + piece]).data)
        return digest.hexdigest()


class ByteText(Windows):
    """Base of the byte-level tasks: V = 256, and `bpb`, bits per byte, is the primary metric.

    Documents are joined; each ends with the byte 0, which is a byte to predict like the others. Beside `bpb`: `loss` in
    nats and `accuracy`. `python -m mixerzoo.tasks.text.entropy TASK` prints what the bytes alone tell.

    A subclass gives `documents`.

    Args:
        eval_bytes: most bytes of validation and of test; None for all. Documents of these splits are in a fixed random
            order, so the beginning is a fair sample.
        sequence_length, windows: see `Windows`.
    """

    metric: ClassVar[str] = "bpb"
    higher_is_better: ClassVar[bool] = False
    separator = END
    tokens_in_data = 256

    def __init__(
        self,
        *,
        sequence_length: Size = 256,
        eval_bytes: Annotated[int, AtLeast(2)] | None = None,
        **windows: Unpack[WindowOptions],
    ) -> None:
        super().__init__(sequence_length=sequence_length, **windows)
        self.eval_bytes = eval_bytes

    def preprocessing(self) -> Bytes:
        return Bytes(self.vocab_size)

    def documents(self) -> dict[str, list[Document]]:
        """The documents of every split."""
        raise NotImplementedError

    def load(self) -> Splits:
        streams = {}
        for split, documents in self.documents().items():
            ordered = documents if split == "train" else in_hash_order(documents)
            joined = b"".join(d.content + bytes([END]) for d in ordered)
            streams[split] = np.frombuffer(joined, np.uint8)[: None if split == "train" else self.eval_bytes]
        return streams

    def compute(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        found = super().compute(metrics)
        return {"bpb": found["loss"] / math.log(2), **found}


def _by_name(documents: list[Document]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {"train": [], "val": [], "test": []}
    for document in documents:
        found[split_of(document.name)].append(document)
    return found


class PythonText(ByteText, name="python_text"):
    """Bytes of the Python standard library's own sources, without its tests: real text that needs no download.

    A file is a document; a hash of its path decides its split: about 90% / 5% / 5%. Another version of Python has other
    files, so the corpus is part of a run's `data.sha256`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return {"sequence_length": 64, "eval_bytes": 2000}

    def documents(self) -> dict[str, list[Document]]:
        return _by_name(python_sources())


class KingJames(ByteText, name="kjv"):
    """Bytes of the King James Bible, 31,102 verses, from Debian's package `bible-kjv`; public domain.

    A chapter is a document, a verse a line of it; a hash of the chapter's name decides its split: about 90% / 5% / 5%.
    The text is pinned by its checksum.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def documents(self) -> dict[str, list[Document]]:
        return _by_name(king_james())


class TextFiles(ByteText, name="text"):
    """Bytes of any file or folder.

    Of a folder, a file is a document, and a hash of its path in the folder decides its split: about 90% / 5% / 5%;
    hidden names (`.git`) are passed over. One file is cut into three parts of 90%, 5% and 5%. With `val_path` the two
    are used as they are, and there is no test split.

    Args:
        path: file or folder.
        val_path: file or folder for validation.
        suffixes: of the files that count in a folder.
        common: see `ByteText`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        (folder / "some.txt").write_bytes(bytes(range(256)) * 20)
        return {"path": str(folder / "some.txt"), "sequence_length": 32}

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None = None,
        suffixes: list[str] = list(TEXT_SUFFIXES),  # noqa: B006 - read only
        **common: Unpack[ByteOptions],
    ) -> None:
        super().__init__(**common)
        self.path, self.val_path = Path(path).expanduser(), None if val_path is None else Path(val_path).expanduser()
        self.suffixes = tuple(s.lower() for s in suffixes)
        self._left = LeftOut()

    def notes(self) -> list[str]:
        return [*super().notes(), *self._left.lines()]

    def documents(self) -> dict[str, list[Document]]:
        documents = read_path(self.path, self.suffixes, left=self._left)
        if self.val_path is not None:
            val = read_path(self.val_path, self.suffixes, key="task.val_path", left=self._left)
            return {"train": documents, "val": val}
        if len(documents) == 1:
            name, content = documents[0]
            first, second = (len(content) * share // 100 for share in (90, 95))
            parts = (content[:first], content[first:second], content[second:])
            return {s: [Document(name, p)] for s, p in zip(("train", "val", "test"), parts, strict=True)}
        found = _by_name(documents)
        empty = [split for split, some in found.items() if not some]
        if empty:
            raise ConfigError(
                f"task.path: {self.path} has {len(documents)} files, too few for a split by file ({', '.join(empty)} "
                "would be empty). Say task.val_path too, or give one file."
            )
        return found


class HubText(ByteText, name="hf_text"):
    """Bytes of a text data set of the Hugging Face hub; a row is a document.

    Needs the package `datasets` (`pip install "mixerzoo[text]"`).

    Args:
        dataset: its name on the hub, e.g. `Salesforce/wikitext`, or a folder that `datasets.load_dataset` reads.
        config: its configuration, e.g. `wikitext-2-raw-v1`.
        text_key: column that holds the text.
        train_split, val_split, test_split: its splits. Without `val_split` a hash of the row's number decides: about
            90% / 5% / 5% of `train_split`. `test_split` may be None.
        max_documents: most rows of a split; None for all.
        common: see `ByteText`.
    """

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return None  # the data must be downloaded

    def __init__(
        self,
        *,
        dataset: str,
        config: str | None = None,
        text_key: str = "text",
        train_split: str = "train",
        val_split: str | None = "validation",
        test_split: str | None = None,
        max_documents: Size | None = None,
        **common: Unpack[ByteOptions],
    ) -> None:
        super().__init__(**common)
        self.dataset, self.config, self.text_key = dataset, config, text_key
        self.named = {"train": train_split, "val": val_split, "test": test_split}
        self.max_documents = max_documents

    def _read(self, split: str) -> list[Document]:
        table = load_hub(self.dataset, self.config, split)
        if self.max_documents is not None and self.max_documents < len(table):
            table = table.select(range(self.max_documents))
        rows = hub_column(table, self.text_key, key="task.text_key")
        if rows and not isinstance(rows[0], str):
            raise ConfigError(f'task.text_key: the column "{self.text_key}" holds {type(rows[0]).__name__}, not text.')
        return [Document(str(i), row.encode()) for i, row in enumerate(rows) if row]

    def documents(self) -> dict[str, list[Document]]:
        if self.named["val"] is None:
            found = _by_name(self._read(self.named["train"] or "train"))
            return found if self.named["test"] is None else {**found, "test": self._read(self.named["test"])}
        return {split: self._read(name) for split, name in self.named.items() if name is not None}

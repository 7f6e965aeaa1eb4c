"""Long Range Arena: ListOps with its generator, and images as sequences of pixels. Tay et al. (2020), arXiv:2011.04006.

Axis letters: B batch, N tokens of a sequence, T trees, H height, W width. Levels of trees count from 0, the root.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, unknown
from ...schema import AtLeast, Between, Count, Seed, Size
from ..base import Batch, create_task, task_class
from ..images.memory import MemoryImages
from .preprocessing import GreyPixels, Symbols
from .sequence import RandomState, SequenceClassification, check_at_least, hash_arrays

# Ids of ListOps: padding, the digits, the operators and the bracket that closes all of them.
PAD, DIGIT, MIN, MAX, MED, SM, END = 0, 1, 11, 12, 13, 14, 15
LISTOPS_SYMBOLS = ("", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")

_OPERATOR_SHARE = 0.25  # of the nodes that may be one
_BATCH_OF_TREES = 20_000
_FRUITLESS_ROUNDS = 20


class _Level(NamedTuple):
    """The nodes of one level of many trees, left to right: the tree and token of each, and the arguments it has."""

    tree: np.ndarray
    token: np.ndarray
    arguments: np.ndarray


def _grow(
    rng: np.random.RandomState, trees: int, max_length: int, max_depth: int, max_args: int
) -> tuple[list[_Level], np.ndarray]:
    """The levels, and which trees (T,) bool were given up as too long, which saves most of the nodes."""
    levels, tree, length = [], np.arange(trees), np.zeros(trees, np.int64)
    for depth in range(1, max_depth + 1):
        inner = rng.random_sample(len(tree)) <= _OPERATOR_SHARE if depth < max_depth else np.zeros(len(tree), bool)
        token = np.where(inner, rng.randint(MIN, SM + 1, len(tree)), rng.randint(DIGIT, DIGIT + 10, len(tree)))
        arguments = np.where(inner, rng.randint(2, max_args + 1, len(tree)), 0)
        length += np.bincount(tree, inner + 1, trees).astype(np.int64)
        arguments[length[tree] >= max_length] = 0
        levels.append(_Level(tree, token, arguments))
        tree = np.repeat(tree, arguments)
        if not len(tree):
            break
    return levels, length >= max_length


def _apply(operators: np.ndarray, arguments: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Results of operators whose arguments lie one after another in `values`."""
    starts = np.cumsum(arguments) - arguments
    median = np.zeros(len(operators), values.dtype)
    middle = operators == MED
    if middle.any():
        of, sizes = values[np.repeat(middle, arguments)], arguments[middle]
        ordered = of[np.lexsort((of, np.repeat(np.arange(len(sizes)), sizes)))]
        begin = np.cumsum(sizes) - sizes
        # the median of an even number of values is rounded down, as int() does
        median[middle] = (ordered[begin + (sizes - 1) // 2] + ordered[begin + sizes // 2]) // 2
    least, most = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return np.choose(operators - MIN, [least, most, median, np.add.reduceat(values, starts) % 10])


def _evaluate(levels: list[_Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Value and number of tokens of every node, by level."""
    values: list[np.ndarray] = [np.empty(0, int)] * len(levels)
    lengths = list(values)
    for depth in range(len(levels) - 1, -1, -1):
        level = levels[depth]
        inner = level.arguments > 0
        value, length = level.token - DIGIT, np.ones(len(level.token), np.int64)
        if inner.any():
            arguments = level.arguments[inner]
            starts = np.cumsum(arguments) - arguments
            value[inner] = _apply(level.token[inner], arguments, values[depth + 1])
            length[inner] = 2 + np.add.reduceat(lengths[depth + 1], starts)
        values[depth], lengths[depth] = value, length
    return values, lengths


def listops(
    rng: np.random.RandomState, trees: int, *, min_length: int, max_length: int, max_depth: int, max_args: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Grow `trees` random expressions, all at once, and keep those of a fitting length.

    Args:
        rng: source of randomness.
        trees: how many to grow.
        min_length, max_length: both exclusive, as published.
        max_depth: levels, the root's included.
        max_args: most arguments of an operator.

    Returns:
        The tokens of every kept expression, uint8, and their values, int64.
    """
    levels, too_long = _grow(rng, trees, max_length, max_depth, max_args)
    values, lengths = _evaluate(levels)
    root = lengths[0]
    kept = (root > min_length) & (root < max_length) & ~too_long
    if not kept.any():
        return [], np.empty(0, np.int64)
    ends = np.cumsum(np.where(kept, root, 0))
    tokens = np.empty(ends[-1], np.uint8)
    place = ends - root  # of the first token of every node of a level
    for depth, level in enumerate(levels):
        some = kept[level.tree]
        tokens[place[some]] = level.token[some]
        inner = level.arguments > 0
        closing = some & inner
        tokens[place[closing] + lengths[depth][closing] - 1] = END
        if not inner.any():
            break
        # arguments follow the operator: one token further, and behind the arguments before
        below, arguments = lengths[depth + 1], level.arguments[inner]
        before = np.cumsum(below) - below
        first = before[np.cumsum(arguments) - arguments]
        place = np.repeat(place[inner] + 1 - first, arguments) + before
    return np.split(tokens, ends[kept][:-1]), values[0][kept]


class ListOps(SequenceClassification, name="listops"):
    """ListOps: the value, 0 to 9, of a nested expression such as `[MAX 2 9 [MIN 4 7 ] 0 ]`.

    Nangia and Bowman (2018), arXiv:1804.06028; lengths and sizes of the Long Range Arena, arXiv:2011.04006. Expressions
    are grown as published: a node is an operator with probability 1/4 (MIN, MAX, MED rounded down, SM the sum modulo
    10; 2 to `max_args` arguments), else a digit; those whose length does not fit are thrown away, and none comes twice,
    in whatever split. Loss and accuracy are taken once per sequence.

    Args:
        min_length, max_length: of an expression in tokens, both exclusive.
        max_depth: levels of a tree.
        max_args: most arguments of an operator.
        use_mask: tell the model which tokens are padding; otherwise padding is the token 0, to the full length.
        num_train, num_eval: expressions for training, and for validation and testing each.
        seed: of the data.

    Raises:
        ConfigError: lengths that leave nothing in between, or no or too few expressions of such lengths.
    """

    vocab_size = len(LISTOPS_SYMBOLS)
    classes = list("0123456789")

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        return {"min_length": 5, "max_length": 40, "num_train": 40, "num_eval": 12}

    def __init__(
        self,
        *,
        min_length: Count = 500,
        max_length: Size = 2000,
        max_depth: Size = 10,
        max_args: Annotated[int, AtLeast(2)] = 10,
        use_mask: bool = True,
        num_train: Size = 96_000,
        num_eval: Size = 2_000,
        seed: Seed = 0,
    ) -> None:
        check_at_least(max_length, min_length + 2, key="max_length", why="both lengths are exclusive")
        self.num_train = num_train
        self.num_eval = num_eval
        self.options = {
            "min_length": min_length,
            "max_length": max_length,
            "max_depth": max_depth,
            "max_args": max_args,
        }
        self.use_mask, self.seed = use_mask, seed
        self.sequence_length = max_length - 1
        self._sequences: list[np.ndarray] = []

    def open(self) -> None:
        if self._sequences:
            return
        wanted = self.num_train + 2 * self.num_eval
        rng, seen, fruitless = RandomState([self.seed, 101]), set(), 0
        sequences: list[np.ndarray] = []
        values: list[int] = []
        while len(sequences) < wanted:
            before = len(sequences)
            for tokens, value in zip(*listops(rng, _BATCH_OF_TREES, **self.options), strict=True):
                digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    sequences.append(tokens)
                    values.append(int(value))
            fruitless = fruitless + 1 if len(sequences) == before else 0
            if fruitless == _FRUITLESS_ROUNDS:
                options = ", ".join(f"{key}={value}" for key, value in self.options.items())
                raise ConfigError(
                    f"task: only {len(sequences):,} of {wanted:,} different expressions were found with {options}. "
                    "Widen the lengths, raise task.max_depth or task.max_args, or ask for fewer."
                )
        self._sequences, self._values = sequences[:wanted], torch.tensor(values[:wanted])

    def _begin(self, split: str) -> int:
        return {"train": 0, "val": self.num_train, "test": self.num_train + self.num_eval}[split]

    def size(self, split: str) -> int:
        return self.num_train if split == "train" else self.num_eval

    def labels(self, split: str) -> Tensor:
        return self._values[self._begin(split) :][: self.size(split)]

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        places = index + self._begin(split)
        rows = [self._sequences[i] for i in places.tolist()]
        return {
            **self.pad(rows, padding=PAD, masked=self.use_mask),
            "target": self._values[places],
            "index": index,
        }

    def fingerprint(self) -> str:
        lengths = np.array([len(row) for row in self._sequences])
        values = self._values.numpy()
        return hash_arrays({"all": (np.concatenate(self._sequences), lengths), "values": (values, values)})

    def preprocessing(self) -> Symbols:
        return Symbols(self.vocab_size, self.sequence_length, self.use_mask, PAD, LISTOPS_SYMBOLS)


class Pixels(SequenceClassification, name="pixels"):
    """Classification of images as sequences of grey pixels, left to right and top to bottom.

    The task "image" of the Long Range Arena, arXiv:2011.04006, for any image set in memory; colour is turned into grey
    (ITU-R 601). A pixel is a token, V = 256; splits are those of the image set. Loss and accuracy are taken once per
    image.

    Args:
        images: the image set: digits (64 tokens), fashion_mnist or fashion_mnist_10k (784), cifar10 or cifar100 (1024).
        root: folder of its files, for those that have the option; None for the default places.
        levels: number of grey levels V.

    Raises:
        ConfigError: not a task of images in memory, or fewer than 2 or more than 256 levels.
    """

    def __init__(
        self, *, images: str = "digits", root: str | None = None, levels: Annotated[int, Between(2, 256)] = 256
    ) -> None:
        cls = task_class(images, key="images")
        if not issubclass(cls, MemoryImages):
            from ..base import TASKS

            raise unknown("task.images", images, [n for n, c in TASKS.items() if issubclass(c, MemoryImages)])
        options: dict[str, Any] = {} if root is None else {"root": root}
        self._source = create_task(images, **options)
        self.vocab_size = levels
        self._data: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def open(self) -> None:
        if self._data:
            return
        assert isinstance(self._source, MemoryImages)
        for split, (images, labels) in self._source.load().items():
            tokens = GreyPixels.levels(images, self.vocab_size)
            self._image_size = tokens.shape[1:3]
            self._data[split] = (tokens.reshape(len(tokens), -1), labels.astype(np.int64))
        self.classes = self._source.classes
        self.sequence_length = self._data["train"][0].shape[1]

    def preprocessing(self) -> GreyPixels:
        height, width = self._image_size
        return GreyPixels(self.vocab_size, self.sequence_length, masked=False, image_size=(height, width))

    def size(self, split: str) -> int:
        return len(self._data[split][1])

    def labels(self, split: str) -> Tensor:
        return torch.from_numpy(self._data[split][1])

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        tokens, labels = (torch.from_numpy(a[index.numpy()].astype(np.int64)) for a in self._data[split])
        return {"input": tokens, "target": labels, "index": index}

    def fingerprint(self) -> str:
        return hash_arrays(self._data)

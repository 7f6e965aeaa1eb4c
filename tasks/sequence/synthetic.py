"""Synthetic tasks: multi-query associative recall, selective copying, induction heads.

Axis letters: B sequences, N tokens of a sequence, V vocabulary, P key-value pairs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Unpack

import numpy as np
import torch

from ...errors import OptionError
from ...schema import Between, Seed, Size
from .sequence import IGNORE, Arrays, Generated, RandomState, SetOptions, check_at_least, distinct, weighted


def _mqar_layout(length: int, keys: np.ndarray, values: np.ndarray, gaps: np.ndarray) -> Arrays:
    rows, pairs = keys.shape
    ids = np.zeros((rows, length), np.int64)
    target = np.full((rows, length), IGNORE, np.int64)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + 2 * gaps
    np.put_along_axis(ids, places, keys, 1)
    np.put_along_axis(target, places, values, 1)
    return ids, target


def mqar(
    count: int,
    *,
    vocab_size: int,
    sequence_length: int,
    num_kv_pairs: int,
    power_a: float,
    random_non_queries: bool,
    rng: np.random.RandomState,
) -> Arrays:
    """Sequences of multi-query associative recall, all at once; see `Mqar`. Ids and targets, both (count, N)."""
    half, slots = vocab_size // 2, sequence_length // 2 - num_kv_pairs
    keys = 1 + distinct(rng, count, num_kv_pairs, half - 1)
    values = half + distinct(rng, count, num_kv_pairs, vocab_size - half)
    gaps = weighted(rng, count, num_kv_pairs, _favour_early(slots, power_a))
    ids, target = _mqar_layout(sequence_length, keys, values, gaps)
    if random_non_queries:
        filler = rng.randint(0, vocab_size, ids.shape, dtype=np.int32)
        ids = np.where(ids == 0, filler, ids)
    return ids, target


def mqar_as_published(
    count: int,
    *,
    vocab_size: int,
    sequence_length: int,
    num_kv_pairs: int,
    power_a: float,
    random_non_queries: bool,
    seed: int,
) -> Arrays:
    """The same from the stream of random numbers that zoology reads, so that the data are its own, bit by bit.

    That is NumPy's legacy generator, asked row by row for all keys, all values and all gaps, and PyTorch's generator
    for the filler, here both seeded by `seed`. Slow: a permutation of half the vocabulary per row.
    """
    rng, half, slots = RandomState(seed), vocab_size // 2, sequence_length // 2 - num_kv_pairs
    p = _favour_early(slots, power_a)
    p = p / p.sum()
    keys = np.stack([1 + rng.choice(half - 1, num_kv_pairs, replace=False) for _ in range(count)])
    values = np.stack([half + rng.choice(vocab_size - half, num_kv_pairs, replace=False) for _ in range(count)])
    gaps = np.stack([rng.choice(slots, num_kv_pairs, replace=False, p=p) for _ in range(count)])
    ids, target = _mqar_layout(sequence_length, keys, values, gaps)
    if random_non_queries:
        filler = torch.randint(vocab_size, ids.shape, generator=torch.Generator().manual_seed(seed)).numpy()
        ids = np.where(ids == 0, filler, ids)
    return ids, target


def _favour_early(slots: int, power_a: float) -> np.ndarray:
    return power_a * np.arange(1, slots + 1, dtype=np.float64) ** (power_a - 1)


class Mqar(Generated, name="mqar"):
    """Multi-query associative recall. Arora et al., Zoology (2023), arXiv:2312.04927.

    A sequence begins with P pairs `key value`; keys are distinct ids of [1, V/2), values distinct ids of [V/2, V). Then
    every key comes once more, as a query, at an even offset; early offsets are favoured. All other later positions hold
    filler. Loss and accuracy are taken at the P queries only: the target at a query is its value.

    Args:
        vocab_size: V.
        sequence_length: N, even.
        num_kv_pairs: P.
        power_a: the offset of slot g (from 0) is drawn with a weight of a (g + 1)^(a - 1); 1 favours none.
        random_non_queries: filler is any id of the vocabulary, also a key's; otherwise it is 0.
        stream: "vectorised" makes all sequences at once; "zoology" gives the published code's data for the seeds
            `seed`, `seed + 1` and `seed + 2` (training, validation, test), row by row.
        num_train, num_eval, seed: see `Generated`.

    Raises:
        ConfigError: an odd length, one without room for pairs and queries (4 P), or a vocabulary that is not larger
            than the length or has fewer than P keys.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 8192,
        sequence_length: Size = 64,
        num_kv_pairs: Size = 8,
        power_a: Annotated[float, Between(0, 10, above=True)] = 0.01,
        random_non_queries: bool = True,
        stream: Literal["vectorised", "zoology"] = "vectorised",
        num_train: Size = 100_000,
        num_eval: Size = 3_000,
        seed: Seed = 0,
    ) -> None:
        super().__init__(num_train=num_train, num_eval=num_eval, seed=seed)
        if sequence_length % 2:
            raise OptionError("sequence_length", f"{sequence_length} is odd; queries stand at even offsets.")
        room = f"four tokens for each of the {num_kv_pairs} pairs (task.num_kv_pairs)"
        check_at_least(sequence_length, 4 * num_kv_pairs, key="sequence_length", why=room)
        why = f"more than task.sequence_length={sequence_length}"
        check_at_least(vocab_size, sequence_length + 1, key="vocab_size", why=why)
        check_at_least(vocab_size, 2 * num_kv_pairs + 2, key="vocab_size", why=f"for {num_kv_pairs} distinct keys")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.stream = stream
        self._options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "sequence_length": sequence_length,
            "num_kv_pairs": num_kv_pairs,
            "power_a": power_a,
            "random_non_queries": random_non_queries,
        }

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        if self.stream == "zoology":
            number = ("train", "val", "test").index(split)
            return mqar_as_published(count, seed=self.seed + number, **self._options)
        return mqar(count, rng=rng, **self._options)


class SelectiveCopying(Generated, name="selective_copying"):
    """Selective copying, as Mamba uses it. Gu and Dao (2023), arXiv:2312.00752; Arjovsky et al., arXiv:1511.06464.

    Of `sequence_length` tokens the last `num_tokens` are the marker V - 1. Before them, `num_tokens` data tokens of
    [1, V - 1) stand at random places among blanks, the id 0. Loss and accuracy are taken at the markers only: their
    targets are the data tokens in order. `mad_selective_copying` is the variant of the MAD suite.

    Args:
        vocab_size: V.
        sequence_length: N, markers included.
        num_tokens: data tokens.
        sets: see `Generated`.

    Raises:
        ConfigError: a vocabulary of fewer than 4, or a length without a place for every data token and marker.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 16,
        sequence_length: Size = 256,
        num_tokens: Size = 16,
        **sets: Unpack[SetOptions],
    ) -> None:
        super().__init__(**sets)
        check_at_least(vocab_size, 4, key="vocab_size", why="a blank, a marker and two data tokens")
        why = f"places for {num_tokens} data tokens and as many markers (task.num_tokens)"
        check_at_least(sequence_length, 2 * num_tokens, key="sequence_length", why=why)
        self.vocab_size, self.sequence_length, self.num_tokens = vocab_size, sequence_length, num_tokens

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        places = self.sequence_length - self.num_tokens
        data = rng.randint(1, self.vocab_size - 1, (count, self.num_tokens))
        where = np.sort(weighted(rng, count, self.num_tokens, np.ones(places)), 1)
        ids = np.zeros((count, self.sequence_length), np.int64)
        np.put_along_axis(ids, where, data, 1)
        ids[:, places:] = self.vocab_size - 1
        target = np.full(ids.shape, IGNORE, np.int64)
        target[:, places:] = data
        return ids, target


class InductionHeads(Generated, name="induction_heads"):
    """Induction heads, as H3 and Mamba use it. Fu et al. (2022), arXiv:2212.14052; Gu and Dao, arXiv:2312.00752.

    Random tokens of [0, V - 1) with one special token V - 1 somewhere, and the special token again at the end. Loss and
    accuracy are taken at the last position only: its target is the token that followed the special one.

    Args:
        vocab_size: V.
        sequence_length: N.
        eval_length: N of validation and test, to see whether the length generalises; None for the same.
        sets: see `Generated`.

    Raises:
        ConfigError: fewer than 3 ids, or fewer than 3 tokens.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 16,
        sequence_length: Size = 256,
        eval_length: Size | None = None,
        **sets: Unpack[SetOptions],
    ) -> None:
        super().__init__(**sets)
        check_at_least(vocab_size, 3, key="vocab_size", why="the special token and two others")
        why = "the special token, what follows it, and the special token again"
        check_at_least(sequence_length, 3, key="sequence_length", why=why)
        if eval_length is not None:
            check_at_least(eval_length, 3, key="eval_length", why=why)
        self.vocab_size, self.train_length = vocab_size, sequence_length
        self.eval_length = sequence_length if eval_length is None else eval_length
        self.sequence_length = max(self.train_length, self.eval_length)

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        length, special = self.train_length if split == "train" else self.eval_length, self.vocab_size - 1
        ids = rng.randint(0, special, (count, length))
        place = rng.randint(0, length - 2, count)  # what follows it stands before the last position
        rows = np.arange(count)
        ids[rows, place], ids[:, -1] = special, special
        target = np.full(ids.shape, IGNORE, np.int64)
        target[:, -1] = ids[rows, place + 1]
        return ids, target

"""The six synthetic tasks of the MAD suite. Poli et al. (2024), arXiv:2403.17844.

Axis letters: B sequences, N tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack

import numpy as np

from ...errors import OptionError
from ...schema import Probability, Seed, Size
from .mad_data import fuzzy_recall, recall
from .sequence import IGNORE, Arrays, Generated, RandomState, SetOptions, check_at_least, weighted


class _EvaluationSets(TypedDict, total=False):
    num_eval: Size
    seed: Seed


class Mad(Generated):
    """Base of the six, with the suite's numbers of sequences; see `Generated`."""

    def __init__(self, *, num_train: Size = 12_800, num_eval: Size = 1_280, seed: Seed = 0) -> None:
        super().__init__(num_train=num_train, num_eval=num_eval, seed=seed)


class RecallOptions(SetOptions, total=False):
    """What `InContextRecall` takes, but for the vocabulary."""

    sequence_length: Size
    multi_query: bool


class InContextRecall(Mad, name="mad_in_context_recall"):
    """In-context recall. MAD (2024), arXiv:2403.17844.

    Pairs `key value` with one value per key and sequence: keys are the lower half of the vocabulary, values the upper
    half, and values may repeat across keys. The sequence ends with a key that was seen. In training loss is taken at
    every position (the target is the next token); in validation and test, loss and accuracy are taken at the final key
    and, with `multi_query`, at every key that came before in the sequence.

    Args:
        vocab_size: V. With `multi_query=false` the id V - 1 stands before the final key.
        sequence_length: N, even; with `multi_query` a sequence has N - 1 tokens.
        multi_query: ask at every repeated key.
        sets: see `Mad`.

    Raises:
        ConfigError: an odd or too short length, or no room for keys and values in the vocabulary.
    """

    noise_vocab_size = 0
    frac_noise = 0.0

    def __init__(
        self,
        *,
        vocab_size: Size = 16,
        sequence_length: Size = 128,
        multi_query: bool = True,
        **sets: Unpack[SetOptions],
    ) -> None:
        super().__init__(**sets)
        if sequence_length % 2:
            raise OptionError("sequence_length", f"{sequence_length} is odd; the sequence is made of pairs.")
        check_at_least(sequence_length, 4, key="sequence_length", why="one pair and the final key")
        special = self.noise_vocab_size + (0 if multi_query else 1)
        why = f"two keys and two values besides {special} other ids"
        check_at_least(vocab_size, special + 4, key="vocab_size", why=why)
        self.vocab_size, self.multi_query = vocab_size, multi_query
        self.sequence_length = sequence_length - 1 if multi_query else sequence_length
        self.given_length = sequence_length

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        return recall(
            count,
            vocab_size=self.vocab_size,
            sequence_length=self.given_length,
            multi_query=self.multi_query,
            noise_vocab_size=self.noise_vocab_size,
            frac_noise=self.frac_noise,
            train_targets=split == "train",
            rng=rng,
        )


class NoisyInContextRecall(InContextRecall, name="mad_noisy_in_context_recall"):
    """In-context recall with noise. MAD (2024), arXiv:2403.17844.

    As `InContextRecall`, but some pairs are two noise tokens, ids after the keys and values, which are never asked for.
    At least one pair of every sequence is real.

    Args:
        vocab_size: V, noise included.
        noise_vocab_size: number of noise ids.
        frac_noise: probability that a pair is noise, in [0, 1).
        common: see `InContextRecall`.

    Raises:
        ConfigError: as `InContextRecall`, or noise without ids for it.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 32,
        noise_vocab_size: Size = 16,
        frac_noise: Probability = 0.2,
        **common: Unpack[RecallOptions],
    ) -> None:
        self.noise_vocab_size = noise_vocab_size
        self.frac_noise = frac_noise
        super().__init__(vocab_size=vocab_size, **common)


class FuzzyInContextRecall(Mad, name="mad_fuzzy_in_context_recall"):
    """Fuzzy in-context recall: keys and values of several tokens. MAD (2024), arXiv:2403.17844.

    Keys and values are tuples of distinct tokens, of sizes that vary in training; keys of validation and test have the
    largest size. Pairs are written one after another, and the sequence is padded on the left. Targets as in
    `InContextRecall`; in validation and test they are all tokens of the value of a key that came before (the first one
    at the key's last token).

    `stopping` says when no further pair is written. "mad_lab", as the published code does: the final pair is drawn
    first, and pairs follow while fewer than N - (its size) - (size of the longest pair) tokens are there. The published
    code promises that the final key comes before, but in some sequences its place is drawn too late; here it always
    does. "reserve": a pair follows as long as it and the final pair fit at their longest; the final key is one of those
    that came.

    Args:
        vocab_size: V. Padding is V - 1 (V - 2 with `multi_query=false`, where V - 1 stands before the final key).
        sequence_length: N.
        k_motif_size: longest key.
        v_motif_size: longest value.
        multi_query: ask at every repeated key, not only at the end.
        stopping: see above.
        sets: see `Mad`.

    Raises:
        ConfigError: a vocabulary too small for such tuples, or a length without room for two pairs.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 16,
        sequence_length: Size = 128,
        k_motif_size: Size = 3,
        v_motif_size: Size = 3,
        multi_query: bool = True,
        stopping: Literal["mad_lab", "reserve"] = "mad_lab",
        **sets: Unpack[SetOptions],
    ) -> None:
        super().__init__(**sets)
        special = 1 if multi_query else 2
        half = max(k_motif_size, v_motif_size, 2)
        why = f"{special} special and twice {half} others, for motifs of that size"
        check_at_least(vocab_size, special + 2 * half, key="vocab_size", why=why)
        room = 2 * (k_motif_size + v_motif_size) + special - 1
        check_at_least(sequence_length, room, key="sequence_length", why="one pair and the final one")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.k_motif_size, self.v_motif_size, self.multi_query = k_motif_size, v_motif_size, multi_query
        self.stopping = stopping

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        return fuzzy_recall(
            count,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            k_motif_size=self.k_motif_size,
            v_motif_size=self.v_motif_size,
            multi_query=self.multi_query,
            stopping=self.stopping,
            train_targets=split == "train",
            rng=rng,
        )


class Memorization(Mad, name="mad_memorization"):
    """Memorization of a fixed map. MAD (2024), arXiv:2403.17844.

    A key, the token V - 1, a key, the token V - 1, ... Loss and accuracy are taken at every V - 1: the target is the
    value of the key before it, by a map from keys to distinct values that is the same for all sequences and splits and
    never shown in the input.

    Args:
        vocab_size: V: the lower half of the V - 1 normal ids are keys, the rest values.
        sequence_length: N, even.
        kv_map_seed: of the map.
        num_train, sets: see `Mad`.

    Raises:
        ConfigError: an odd or too short length, or a vocabulary without two keys and two values.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 256,
        sequence_length: Size = 32,
        kv_map_seed: Seed = 12345,
        num_train: Size = 256,
        **sets: Unpack[_EvaluationSets],
    ) -> None:
        super().__init__(num_train=num_train, **sets)
        if sequence_length % 2:
            raise OptionError("sequence_length", f"{sequence_length} is odd; the sequence is made of pairs.")
        check_at_least(vocab_size, 5, key="vocab_size", why="two keys, two values and one other")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.kv_map_seed = kv_map_seed

    def mapping(self) -> np.ndarray:
        """Values of the keys 0, 1, ..., ((V - 1) // 2,) int64."""
        keys = (self.vocab_size - 1) // 2
        return keys + RandomState(self.kv_map_seed).permutation(self.vocab_size - 1 - keys)[:keys]

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        mapping = self.mapping()
        keys = rng.randint(0, len(mapping), (count, self.sequence_length // 2))
        ids = np.full((count, self.sequence_length), self.vocab_size - 1, np.int64)
        target = np.full(ids.shape, IGNORE, np.int64)
        ids[:, ::2], target[:, 1::2] = keys, mapping[keys]
        return ids, target


class Compression(Mad, name="mad_compression"):
    """Compression into the last token. MAD (2024), arXiv:2403.17844.

    N - 1 random tokens and the token V - 1; the targets, at every position, are the tokens themselves. It is a task
    only for a model that has to draw all of them from the features at the last position, which is what the objective
    "reconstruct" of the language backbone does and what this task asks for.

    Args:
        vocab_size: V.
        sequence_length: N.
        sets: see `Mad`.

    Raises:
        ConfigError: fewer than 3 ids, or fewer than 2 tokens.
    """

    objective = "reconstruct"

    def __init__(
        self,
        *,
        vocab_size: Size = 16,
        sequence_length: Size = 32,
        **sets: Unpack[SetOptions],
    ) -> None:
        super().__init__(**sets)
        check_at_least(vocab_size, 3, key="vocab_size", why="two to compress and one other")
        check_at_least(sequence_length, 2, key="sequence_length", why="one to compress and the last one")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        ids = rng.randint(0, self.vocab_size - 1, (count, self.sequence_length))
        ids[:, -1] = self.vocab_size - 1
        return ids, ids


class MadSelectiveCopying(Mad, name="mad_selective_copying"):
    """Selective copying as in MAD (2024), arXiv:2403.17844.

    The data tokens stand in order at random places among blanks (V - 2), then comes the copy token V - 1, then as many
    blanks as data tokens. Loss and accuracy are taken at these last blanks only: the targets are the data tokens in
    order. A blank never stands directly before the copy token, as in the published code.

    Args:
        vocab_size: V.
        sequence_length: N.
        num_tokens_to_copy: data tokens, ids of [0, V - 2).
        sets: see `Mad`.

    Raises:
        ConfigError: fewer than 4 ids, or no room for the data, the copy token and the answer.
    """

    def __init__(
        self,
        *,
        vocab_size: Size = 16,
        sequence_length: Size = 256,
        num_tokens_to_copy: Size = 16,
        **sets: Unpack[SetOptions],
    ) -> None:
        super().__init__(**sets)
        check_at_least(vocab_size, 4, key="vocab_size", why="a blank, the copy token and two others")
        why = f"places for {num_tokens_to_copy} tokens and their copies, and the copy token (task.num_tokens_to_copy)"
        check_at_least(sequence_length, 2 * num_tokens_to_copy + 1, key="sequence_length", why=why)
        self.vocab_size, self.sequence_length, self.num_tokens = vocab_size, sequence_length, num_tokens_to_copy

    def generate(self, split: str, count: int, rng: np.random.RandomState) -> Arrays:
        places, copies = self.sequence_length - self.num_tokens - 1, self.num_tokens
        data = rng.randint(0, self.vocab_size - 2, (count, copies))
        where = np.full((count, copies), places - 1)
        where[:, :-1] = np.sort(weighted(rng, count, copies - 1, np.ones(max(1, places - 1))), 1)
        ids = np.full((count, self.sequence_length), self.vocab_size - 2, np.int64)
        np.put_along_axis(ids, where, data, 1)
        ids[:, places] = self.vocab_size - 1
        target = np.full(ids.shape, IGNORE, np.int64)
        target[:, places + 1 :] = data
        return ids, target

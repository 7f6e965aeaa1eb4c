"""Generators of the recall tasks of the MAD suite, all sequences at once. Poli et al. (2024), arXiv:2403.17844.

Axis letters: B sequences, N tokens of a sequence, S pairs of a sequence, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from .sequence import IGNORE, Arrays, distinct


def next_token_targets(tokens: np.ndarray, targets: np.ndarray, *, everywhere: bool) -> Arrays:
    """Ids and targets (B, N) of sequences (B, N + 1): the last token is only a target.

    Args:
        tokens: (B, N + 1).
        targets: (B, N + 1), the token itself where it is to be predicted, else `IGNORE`.
        everywhere: every next token is a target.
    """
    return tokens[:, :-1], (tokens if everywhere else targets)[:, 1:]


def first_seen(items: np.ndarray, size: int, real: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which items of a row (B, S) came before in it, (B, S) bool, and all that came, (B, size) bool."""
    rows, steps = items.shape
    present, before = np.zeros((rows, size), bool), np.zeros((rows, steps), bool)
    every = np.arange(rows)
    for step in range(steps):
        item = items[:, step]
        before[:, step] = present[every, item]
        present[every, item] |= True if real is None else real[:, step]
    return before, present


def choose_present(rng: np.random.RandomState, present: np.ndarray) -> np.ndarray:
    """One index per row (B,), uniformly among those that are True in (B, size)."""
    return (rng.random_sample(present.shape) * present).argmax(1)


def recall(
    count: int,
    *,
    vocab_size: int,
    sequence_length: int,
    multi_query: bool,
    noise_vocab_size: int,
    frac_noise: float,
    train_targets: bool,
    rng: np.random.RandomState,
) -> Arrays:
    """Sequences of plain or noisy in-context recall; see `InContextRecall`."""
    normal = vocab_size - noise_vocab_size - (0 if multi_query else 1)
    num_keys, pairs = normal // 2, sequence_length // 2 - 1
    rows = np.arange(count)[:, None]
    meaning = rng.randint(num_keys, normal, (count, num_keys))
    keys = rng.randint(0, num_keys, (count, pairs))
    real = np.ones((count, pairs), bool)
    if frac_noise:
        real = rng.random_sample((count, pairs)) >= frac_noise
        real[rows[:, 0], rng.randint(0, pairs, count)] = True  # something to ask for
    before, present = first_seen(keys, num_keys, real)
    probe = choose_present(rng, present)
    tokens = np.empty((count, pairs, 2), np.int64)
    tokens[..., 0], tokens[..., 1] = keys, meaning[rows, keys]
    asked = before & real if multi_query else np.zeros_like(real)
    targets = np.full(tokens.shape, IGNORE, np.int64)
    targets[..., 1] = np.where(asked, tokens[..., 1], IGNORE)
    if frac_noise:
        noise = normal + rng.randint(0, noise_vocab_size, tokens.shape)
        tokens = np.where(real[..., None], tokens, noise)
    answer = meaning[rows[:, 0], probe]
    last = [] if multi_query else [np.full(count, vocab_size - 1)]
    tail = np.stack([*last, probe, answer], 1)
    tail_targets = np.full(tail.shape, IGNORE, np.int64)
    tail_targets[:, -1] = answer
    tokens = np.concatenate([tokens.reshape(count, -1), tail], 1)
    targets = np.concatenate([targets.reshape(count, -1), tail_targets], 1)
    return next_token_targets(tokens, targets, everywhere=train_targets)


def _draw_motifs(rng: np.random.RandomState, rows: int, longest: int, smallest: int, low: int, high: int) -> np.ndarray:
    """Tuples of different ids of [low, high), all sizes from `smallest` on alike: (rows, longest), -1 behind them."""
    size = rng.randint(smallest, longest + 1, rows)
    motif = low + distinct(rng, rows, longest, high - low)
    return np.where(np.arange(longest) < size[:, None], motif, -1)


class _Rows:
    """Sequences that grow pair by pair: tokens and targets (B, N + 1), and the pairs that were written.

    Args:
        count: B.
        width: N + 1.
        steps: most pairs of a sequence.
        key_size, value_size: tokens of the longest key and value.
    """

    def __init__(self, count: int, width: int, steps: int, key_size: int, value_size: int) -> None:
        self.every = np.arange(count)
        self.tokens, self.targets = np.zeros((count, width), np.int64), np.full((count, width), IGNORE, np.int64)
        self.filled = np.zeros(count, np.int64)
        self.keys = np.full((count, steps, key_size), -2, np.int64)
        self.values = np.full((count, steps, value_size), -1, np.int64)
        self.new = np.zeros((count, steps), bool)  # the first time that a key comes

    def append(self, row: np.ndarray, motif: np.ndarray, asked: np.ndarray) -> None:
        """Write a motif (R, size), -1 behind it, to some rows (R,); where `asked` (R,), it is a target."""
        for i in range(motif.shape[1]):
            some = motif[:, i] >= 0
            place = self.filled[row[some]] + i
            self.tokens[row[some], place] = motif[some, i]
            self.targets[row[some], place] = np.where(asked[some], motif[some, i], IGNORE)
        self.filled[row] += (motif >= 0).sum(1)

    def pair(self, row: np.ndarray, step: int, key: np.ndarray, value: np.ndarray, *, ask: bool) -> None:
        """Write a key and its value, which is that of the first time, and, if `ask`, a target from the second on."""
        same = (self.keys[row, :step] == key[:, None]).all(-1)
        seen = same.any(1)
        if step:
            value = np.where(seen[:, None], self.values[row, same.argmax(1)], value)
        self.append(row, key, np.zeros(len(row), bool))
        self.append(row, value, seen if ask else np.zeros(len(row), bool))
        self.keys[row, step], self.values[row, step], self.new[row, step] = key, value, ~seen

    def padded(self, padding: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets with the padding on the left."""
        width = self.tokens.shape[1]
        source = np.arange(width) - (width - self.filled)[:, None]
        pad, source = source < 0, source.clip(0)
        tokens, targets = (np.take_along_axis(a, source, 1) for a in (self.tokens, self.targets))
        return np.where(pad, padding, tokens), np.where(pad, IGNORE, targets)


def fuzzy_recall(
    count: int,
    *,
    vocab_size: int,
    sequence_length: int,
    k_motif_size: int,
    v_motif_size: int,
    multi_query: bool,
    stopping: str,
    train_targets: bool,
    rng: np.random.RandomState,
) -> Arrays:
    """Sequences of fuzzy in-context recall; see `FuzzyInContextRecall`."""
    normal = vocab_size - (1 if multi_query else 2)
    smallest = 1 if train_targets else k_motif_size
    longest = k_motif_size + v_motif_size

    def draw_keys(rows: int) -> np.ndarray:
        return _draw_motifs(rng, rows, k_motif_size, smallest, 0, normal // 2)

    def draw_values(rows: int) -> np.ndarray:
        return _draw_motifs(rng, rows, v_motif_size, 1, normal // 2, normal)

    rows = _Rows(count, sequence_length + 1, sequence_length // 2, k_motif_size, v_motif_size)
    if stopping == "mad_lab":
        # the final pair is drawn first; it comes once before, at a random place where it is sure to be reached
        key, value = draw_keys(count), draw_values(count)
        size = (key >= 0).sum(1) + (value >= 0).sum(1)
        limit = np.maximum(1, sequence_length - size - longest)
        place = np.floor(rng.random_sample(count) * np.maximum(1, limit - longest + 1))
        shown = np.zeros(count, bool)
    else:
        key = value = np.empty(0)
        reserve = 2 * longest + (0 if multi_query else 1)  # the next pair, the final one and its prefix
        limit = np.full(count, sequence_length - reserve + 1)
    for step in range(rows.keys.shape[1]):
        row = rows.every[rows.filled < limit]
        if not len(row):
            break
        new_key, new_value = draw_keys(len(row)), draw_values(len(row))
        if stopping == "mad_lab":
            due = ~shown[row] & (rows.filled[row] >= place[row])
            new_key = np.where(due[:, None], key[row], new_key)
            final = (new_key == key[row]).all(1)
            new_value = np.where(final[:, None], value[row], new_value)
            shown[row] |= final
        rows.pair(row, step, new_key, new_value, ask=multi_query)
    if stopping != "mad_lab":
        probe = choose_present(rng, rows.new)
        key, value = rows.keys[rows.every, probe], rows.values[rows.every, probe]
    if not multi_query:
        rows.append(rows.every, np.full((count, 1), vocab_size - 1), np.zeros(count, bool))
    rows.append(rows.every, key, np.zeros(count, bool))
    rows.append(rows.every, value, np.ones(count, bool))
    tokens, targets = rows.padded(vocab_size - (1 if multi_query else 2))
    return next_token_targets(tokens, targets, everywhere=train_targets)

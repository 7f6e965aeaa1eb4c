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


def fuzzy_recall(
    count: int,
    *,
    vocab_size: int,
    sequence_length: int,
    k_motif_size: int,
    v_motif_size: int,
    multi_query: bool,
    train_targets: bool,
    rng: np.random.RandomState,
) -> Arrays:
    """Sequences of fuzzy in-context recall; see `FuzzyInContextRecall`."""
    normal = vocab_size - (1 if multi_query else 2)
    smallest = 1 if train_targets else k_motif_size
    longest, width = k_motif_size + v_motif_size, sequence_length + 1
    rows, steps = np.arange(count), sequence_length // 2
    tokens, targets = np.zeros((count, width), np.int64), np.full((count, width), IGNORE, np.int64)
    filled = np.zeros(count, np.int64)
    # what was written so far; new: the first time that a key comes
    keys = np.full((count, steps, k_motif_size), -2, np.int64)
    values = np.full((count, steps, v_motif_size), -1, np.int64)
    new = np.zeros((count, steps), bool)

    def append(row: np.ndarray, motif: np.ndarray, asked: np.ndarray) -> None:
        for i in range(motif.shape[1]):
            some = motif[:, i] >= 0
            place = filled[row[some]] + i
            tokens[row[some], place] = motif[some, i]
            targets[row[some], place] = np.where(asked[some], motif[some, i], IGNORE)
        filled[row] += (motif >= 0).sum(1)

    reserve = 2 * longest + (0 if multi_query else 1)  # the next pair, the probe and its prefix
    for step in range(steps):
        row = rows[filled + reserve <= sequence_length]
        if not len(row):
            break
        key = _draw_motifs(rng, len(row), k_motif_size, smallest, 0, normal // 2)
        value = _draw_motifs(rng, len(row), v_motif_size, 1, normal // 2, normal)
        same = (keys[row, :step] == key[:, None]).all(-1)
        seen = same.any(1)
        if step:
            value = np.where(seen[:, None], values[row, same.argmax(1)], value)
        nothing = np.zeros(len(row), bool)
        append(row, key, nothing)
        append(row, value, seen if multi_query else nothing)
        keys[row, step], values[row, step], new[row, step] = key, value, ~seen
    probe = choose_present(rng, new)
    if not multi_query:
        append(rows, np.full((count, 1), vocab_size - 1), np.zeros(count, bool))
    append(rows, keys[rows, probe], np.zeros(count, bool))
    append(rows, values[rows, probe], np.ones(count, bool))
    # padding stands on the left
    source = np.arange(width) - (width - filled)[:, None]
    pad = source < 0
    source = source.clip(0)
    tokens = np.where(pad, vocab_size - (1 if multi_query else 2), np.take_along_axis(tokens, source, 1))
    targets = np.where(pad, IGNORE, np.take_along_axis(targets, source, 1))
    return next_token_targets(tokens, targets, everywhere=train_targets)

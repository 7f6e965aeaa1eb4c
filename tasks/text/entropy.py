"""What the bytes of a text alone tell: the entropies that a language model has to beat.

    python -m mixerzoo.tasks.text.entropy python_text eval_bytes=131072

Axis letters: T tokens of a split, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np

from ...errors import ConfigError
from ..base import create_task
from .text import Windows


def _pair_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)


def unigram_entropy(tokens: np.ndarray, vocab_size: int = 256) -> float:
    """Entropy of the tokens' own frequencies, bits per token: no model that knows frequencies only has fewer."""
    share = np.bincount(tokens, minlength=vocab_size) / len(tokens)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def bigram_entropy(tokens: np.ndarray, vocab_size: int = 256) -> float:
    """Entropy of a token given the one before, by the tokens' own frequencies, bits per token.

    No model that looks at one token has fewer bits on these tokens, not even one fitted to them.
    """
    counts = _pair_counts(tokens, vocab_size)
    before = counts.sum(1, keepdims=True)
    share = np.divide(counts, before, out=np.ones(counts.shape), where=counts > 0)
    return float(-(counts * np.log2(share)).sum() / counts.sum())


def fitted_bigram(train: np.ndarray, tokens: np.ndarray, vocab_size: int = 256, prior: float = 1.0) -> float:
    """Bits per token of `tokens` under the pair frequencies of `train`.

    The share of a pair is mixed with the token's own share, which counts as `prior` further occurrences of the token
    before; every token's own count has one added.
    """
    single = np.bincount(train, minlength=vocab_size) + 1.0
    single /= single.sum()
    counts = _pair_counts(train, vocab_size)
    share = (counts + prior * single) / (counts.sum(1, keepdims=True) + prior)
    test = _pair_counts(tokens, vocab_size)
    return float(-(test * np.log2(share)).sum() / test.sum())


def fitted_unigram(train: np.ndarray, tokens: np.ndarray, vocab_size: int = 256) -> float:
    """Bits per token of `tokens` under the frequencies of `train`, with one added to every count."""
    single = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-(np.bincount(tokens, minlength=vocab_size) * np.log2(single / single.sum())).sum() / len(tokens))


def table(task: Windows) -> str:
    """Entropies of every split of an opened task, as lines of a Markdown table."""
    lines = [
        "| split | bytes | uniform | unigram | bigram | unigram of train | bigram of train |",
        "|---|---|---|---|---|---|---|",
    ]
    train, size = task.stream("train"), task.tokens_in_data
    for split in task.splits():
        tokens = task.stream(split)
        figures = (
            math.log2(size),
            unigram_entropy(tokens, size),
            bigram_entropy(tokens, size),
            fitted_unigram(train, tokens, size),
            fitted_bigram(train, tokens, size),
        )
        lines.append(f"| {split} | {len(tokens):,} | " + " | ".join(f"{f:.4f}" for f in figures) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the entropies of a text task: its name, by default `python_text`, then options as `key=value`."""
    import yaml

    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given.pop(0) if given and "=" not in given[0] else "python_text"
    try:
        options = {}
        for text in given:
            key, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f'"{text}": options are written key=value.')
            options[key.removeprefix("task.")] = yaml.safe_load(value)
        task = create_task(name, **options)
        if not isinstance(task, Windows) or getattr(task, "tokens_in_data", 2**32) > 4096:
            raise ConfigError(f'task.name: "{name}" is not a task of text with a vocabulary of at most 4,096.')
        task.open()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Bits per byte of {name}, SHA-256 {task.fingerprint()}:\n\n{table(task)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Errors that a user can act on: the key, the value, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake in a name, an option or a configuration. `train.py` prints it and exits with 2."""


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """`' Did you mean "pooling"?'`, or the empty string when nothing is near."""
    word = str(value)
    near = difflib.get_close_matches(word, list(allowed), n=5, cutoff=0.5)
    if not near:
        return ""

    def likeness(name: str) -> tuple[float, int]:  # of equally similar names, the one that begins alike
        return round(difflib.SequenceMatcher(None, word, name).ratio(), 6), len(os.path.commonprefix([word, name]))  # noqa: RUF071 - of words, not of paths

    return f' Did you mean "{max(near, key=likeness)}"?'


def unknown(key: str, value: object, allowed: Iterable[str], *, limit: int = 40) -> ConfigError:
    """The error for a name that is not one of `allowed`.

    Args:
        key: full path of the key that holds the name, e.g. `model.stages[2].mixer`.
        value: what was given.
        allowed: the valid names; at most `limit` are printed.
    """
    names = sorted(allowed)
    shown = ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
    return ConfigError(f'{key}: "{value}" is not known.{did_you_mean(value, names)} Allowed: {shown or "(nothing)"}.')

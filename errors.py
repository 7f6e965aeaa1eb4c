"""Errors that a user can act on: the key, the value, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class ConfigError(ValueError):
    """A mistake in a name, an option or a configuration. `train.py` prints it and exits with 2."""


class OptionError(ConfigError):
    """A mistake in an option of a part. The part names its option; whoever builds the part adds the path, by `under`.

    Args:
        option: the option, or the path from the part down to it, e.g. `selector.keep`; "" for the part as a whole.
        reason: the value and what is allowed.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(option, reason)
        self.option, self.reason = option, reason

    @property
    def head(self) -> str:
        """The first name of the path."""
        return re.split(r"[.\[]", self.option, maxsplit=1)[0]

    def put_under(self, key: str) -> None:
        """Put `key` before the path."""
        joined = not key or not self.option or self.option.startswith("[")
        self.option = key + self.option if joined else f"{key}.{self.option}"
        self.args = (self.option, self.reason)

    def rename(self, paths: Mapping[str, str]) -> None:
        """Put another path in place of the first name, where `paths` has one."""
        head = self.head
        self.option = paths.get(head, head) + self.option[len(head) :]
        self.args = (self.option, self.reason)

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}" if self.option else self.reason


@contextmanager
def under(key: str) -> Iterator[None]:
    """Errors about options that come out of the block get `key` before their path."""
    try:
        yield
    except OptionError as error:
        error.put_under(key)
        raise


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """`' Did you mean "pooling"?'`, or the empty string when nothing is near."""
    word = str(value)
    near = difflib.get_close_matches(word, list(allowed), n=5, cutoff=0.5)
    if not near:
        return ""

    def likeness(name: str) -> tuple[float, int]:  # of equally similar names, the one that begins alike
        return round(difflib.SequenceMatcher(None, word, name).ratio(), 6), len(os.path.commonprefix([word, name]))  # noqa: RUF071 - of words, not of paths

    return f' Did you mean "{max(near, key=likeness)}"?'


def unknown(key: str, value: object, allowed: Iterable[str], *, limit: int = 40) -> OptionError:
    """The error for a name that is not one of `allowed`.

    Args:
        key: path of the key that holds the name, from the part that raises the error on, e.g. `stages[2].mixer`.
        value: what was given.
        allowed: the valid names; at most `limit` are printed.
    """
    names = sorted(allowed)
    shown = ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
    return OptionError(key, f'"{value}" is not known.{did_you_mean(value, names)} Allowed: {shown or "(nothing)"}.')

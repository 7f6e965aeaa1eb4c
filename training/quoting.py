"""Values as a command line takes them, for commands and advice that can be copied."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
_WORDS = ("null", "true", "false")


def _reads_as_text(value: str) -> bool:
    """Whether Hydra takes a bare word for the text that it is, not for a number, truth value or nothing."""
    if not _PLAIN.fullmatch(value) or value.lower() in _WORDS:
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def quote(text: str) -> str:
    """Text in the quotes of Hydra's grammar: `"lr=0.1"`."""
    mark = "'" if '"' in text else '"'
    # backslashes stand for themselves but before a quote
    before_mark = re.sub(rf"(\\*){mark}", lambda m: m[1] * 2 + "\\" + mark, text)
    text = re.sub(r"\\+$", lambda m: m[0] * 2, before_mark)
    return f"{mark}{text}{mark}"


def literal(value: Any) -> str:
    """A value as Hydra's grammar writes it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(literal, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value)
    return text if _reads_as_text(text) else quote(text)


def argument(key: str, value: Any) -> str:
    """`key=value` for a shell, e.g. `'run_dir="lr=0.1"'`."""
    return shlex.quote(f"{key}={literal(value)}")

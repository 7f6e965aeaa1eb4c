"""`python -m mixerzoo VERB`: finds the verb's file and calls it. Training is a verb, too."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError, unknown

# Folders of verbs, by their packages below this one. The contract's stand above us, so that none is imported here.
ROOMS = ("training.cli.verbs", "contract.verbs")
_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).resolve().parents[2]


def verbs() -> dict[str, str]:
    """Verb -> its help, read without importing: what most verbs need takes long to load."""
    files = {path.stem: path for room in ROOMS for path in _ROOT.joinpath(*room.split(".")).glob("*.py")}
    files.pop("__init__", None)
    texts = {verb: path.read_text(encoding="utf-8") for verb, path in sorted(files.items())}
    return {verb: ast.get_docstring(ast.parse(text)) or "" for verb, text in texts.items()}


def usage() -> str:
    """The help of the whole command."""
    lines = ["usage: python -m mixerzoo VERB [ARGUMENTS]; python -m mixerzoo VERB --help explains one", ""]
    known = verbs()
    width = max(map(len, known))
    lines += [f"  {name:{width}}  {text.splitlines()[0]}" for name, text in known.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 2 for a mistake of the user.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("--help", "-h"):
        print(usage())
        return 0
    verb, rest = given[0], given[1:]
    try:
        known = verbs()
        if verb not in known:
            raise unknown("python -m mixerzoo", verb, known)
        if verb != "train" and any(flag in rest for flag in ("--help", "-h")):
            print(known[verb])
            return 0
        room = next(room for room in ROOMS if _ROOT.joinpath(*room.split("."), f"{verb}.py").is_file())
        return importlib.import_module(f"{_PACKAGE}.{room}.{verb}").main(rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        stop_printing()
        return 0


def stop_printing() -> None:
    """After a BrokenPipeError, as of `... | head`: the reader has seen enough, and the exit must not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def split(arguments: Sequence[str], *, verb: str) -> tuple[list[str], dict[str, str]]:
    """Words and KEY=VALUE pairs among arguments, with `plugins=` loaded.

    Raises:
        ConfigError: an option that starts with a dash, or a plugin that cannot be loaded.
    """
    from ...plugins import load_plugins

    words, pairs = [], {}
    for text in arguments:
        if text.startswith("-"):
            raise ConfigError(f"{verb}: {text}: there is no such option; settings are written KEY=VALUE.")
        key, equals, value = text.partition("=")
        if key == "plugins" and equals:
            load_plugins(value.strip("[]").split(","))
        elif equals:
            pairs[key] = value
        else:
            words.append(text)
    return words, pairs

"""Where text comes from: the Python standard library's sources, the King James Bible, files and folders, the hub.

A corpus is a list of documents, and a document belongs to one split for good.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..folders import LeftOut, walk

# Debian's bible-kjv 4.36 prints these bytes for the whole text, one verse a line.
KJV_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
KJV_VERSES = 31_102
_KJV_ALL = "gen1:1-rev22:21"

# Of the standard library: tests repeat themselves and are not installed everywhere; build files differ by machine.
_NOT_SOURCES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_BUILD_FILES = ("_sysconfigdata", "_sysconfig_vars")

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".tex", ".csv", ".json", ".jsonl", ".c", ".h", ".cpp")


class Document(NamedTuple):
    """name: unique in its corpus, decides the split; content: bytes."""

    name: str
    content: bytes


def split_of(name: str, *, parts: int = 20) -> str:
    """The split of a document, by a hash of its name: 1 of `parts` for "test", 1 for "val", the rest for "train"."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % parts
    return {0: "test", 1: "val"}.get(number, "train")


def in_hash_order(documents: list[Document]) -> list[Document]:
    """Sorted by a hash of the name, so that the beginning of the list is a fair sample of it."""
    return sorted(documents, key=lambda d: hashlib.sha256(b"order" + d.name.encode()).digest())


def python_sources(root: Path | None = None) -> list[Document]:
    """The sources of the Python standard library that runs this, without its tests; named by their path in it.

    Raises:
        ConfigError: no sources there, as in a zipped or stripped installation.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_SOURCES.isdisjoint(relative.parts) and not path.name.startswith(_BUILD_FILES) and path.is_file():
            found.append(Document(relative.as_posix(), path.read_bytes()))
    if not found:
        raise ConfigError(f"task: this Python has no sources of its standard library in {root}; use task=text instead.")
    return found


def king_james(command: str = "bible", sha256: str = KJV_SHA256) -> list[Document]:
    """The King James Bible, a document per chapter, named as "Gen 1" is: by the program's short names, "Ge1".

    Verses are lines of their text without their numbers. Read from the program of Debian's package `bible-kjv`.

    Args:
        command: the program.
        sha256: of all it prints.

    Raises:
        ConfigError: the program is missing, fails, or prints another text.
    """
    program = shutil.which(command)
    if program is None:
        raise ConfigError(
            f'task: the King James Bible is read from the program "{command}", which is not there. Install Debian\'s '
            "package bible-kjv (apt install bible-kjv), or use task=text task.path=FILE."
        )
    try:
        done = subprocess.run([program, "-f", _KJV_ALL], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"task: {program} failed: {error}.") from error
    digest = hashlib.sha256(done.stdout).hexdigest()
    if done.returncode or digest != sha256:
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigError(
            f"task: {program} printed {len(done.stdout):,} bytes with the SHA-256 {digest}, not the expected {sha256} "
            f"of Debian's bible-kjv 4.36{f' ({said})' if said else ''}."
        )
    chapters: dict[str, list[bytes]] = {}
    for line in done.stdout.splitlines():
        reference, _, verse = line.partition(b" ")
        chapters.setdefault(reference.partition(b":")[0].decode(), []).append(verse)
    return [Document(name, b"\n".join(verses) + b"\n") for name, verses in chapters.items()]


def read_path(
    path: Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES, *, key: str = "task.path", left: LeftOut | None = None
) -> list[Document]:
    """The documents of a file (one) or of a folder (a file each, by suffix, sorted), without empty ones.

    Args:
        path: file or folder; hidden names in a folder are passed over.
        suffixes: of the files that count in a folder.
        key: of the setting, for messages.
        left: takes what is passed over.

    Raises:
        ConfigError: nothing there, or a file that cannot be read.
    """
    left = LeftOut() if left is None else left
    if path.is_dir():
        files = sorted(p for p in walk(path, suffixes, left) if p.is_file())
        if not files:
            raise ConfigError(f"{key}: there is no file with one of the suffixes {', '.join(suffixes)} in {path}.")
    elif path.is_file():
        files = [path]
    else:
        raise ConfigError(f"{key}: there is no file or folder {path}.")
    return read_files(files, path if path.is_dir() else path.parent, key=key, left=left)


def read_files(files: Sequence[Path], base: Path, *, key: str, left: LeftOut) -> list[Document]:
    """The documents of files, named by their paths relative to `base`, without empty ones.

    Raises:
        ConfigError: a file that cannot be read, or all of them empty.
    """
    try:
        read = [Document(p.relative_to(base).as_posix(), p.read_bytes()) for p in files]
    except OSError as error:
        raise ConfigError(f"{key}: {error}.") from error
    for document in read:
        if not document.content:
            left.add("empty files", document.name)
    documents = [d for d in read if d.content]
    if not documents:
        raise ConfigError(f"{key}: {base} holds no text.")
    return documents


def load_hub(dataset: str, config: str | None, split: str) -> Any:
    """A split of a data set of the Hugging Face hub, or of a folder that `datasets.load_dataset` reads.

    Raises:
        ConfigError: the package `datasets` is missing, or it cannot load this.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError as error:
        raise ConfigError('task: this task needs the package datasets: pip install "mixerzoo[text]".') from error
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # its errors have no common base, and all of them are about what the user asked for
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        named = f'"{dataset}"' + (f' (configuration "{config}")' if config else "")
        raise ConfigError(f"task.dataset: the split {split!r} of {named} cannot be loaded: {reason}") from error


def hub_column(table: Any, column: str, *, key: str) -> list[Any]:
    """A column of a table of `datasets`.

    Raises:
        ConfigError: there is none of this name.
    """
    if column not in table.column_names:
        raise ConfigError(f'{key}: there is no column "{column}". Allowed: {", ".join(table.column_names)}.')
    return list(table[column])

"""Samples in folders by class and split: which folders are splits, which files count, and what was left out and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError

# Names of split folders, without case, digits at the end (train2017) and words that say nothing (test_set, seg_train).
_SYNONYMS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_FILLER = ("set", "data", "dataset", "split", "images", "imgs", "img", "folder", "seg")
# Made by operating systems and archives, not by people.
_MACHINE_MADE = frozenset(
    {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no sample by its name: `.ipynb_checkpoints`, `._cat.png`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in _MACHINE_MADE


def split_named(name: str) -> str | None:
    """The split, "train", "val" or "test", that a folder of this name holds; None for other names."""
    words = [w for w in re.split(r"[^a-z]+", name.lower()) if w]
    words = [w for w in words if w not in _FILLER] or words
    if len(words) != 1:
        return None
    for split, synonyms in _SYNONYMS.items():
        if words[0] in synonyms or words[0] in [s + filler for s in synonyms for filler in _FILLER]:
            return split
    return None


class LeftOut:
    """What a scan passed over, by reason, for people."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        """One more."""
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def merge(self, other: LeftOut) -> None:
        """What another scan passed over, too."""
        self.counts += other.counts
        self.first = {**other.first, **self.first}

    def lines(self) -> list[str]:
        """A line per reason, with the number and the first name."""
        return [
            f"left out, {reason}: {self.first[reason]}" + (f" and {count - 1:,} more" if count > 1 else "")
            for reason, count in self.counts.items()
        ]


def _entries(folder: Path, left: LeftOut, base: Path) -> list[os.DirEntry[str]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if is_hidden(entry.name):
                left.add("hidden names", os.path.relpath(entry.path, base))
            else:
                found.append(entry)
    return found


def walk(folder: Path, suffixes: Collection[str], left: LeftOut, *, base: Path | None = None) -> Iterator[Path]:
    """The files below a folder with one of the suffixes (lower case, with the dot), sorted; links are followed.

    Args:
        folder: where to begin.
        suffixes: of the files that count.
        left: takes what is passed over: hidden names and other suffixes.
        base: names in `left` are relative to it; by default `folder`.
    """
    base = folder if base is None else base
    stack, seen = [folder], {os.path.realpath(folder)}
    while stack:
        here = stack.pop()
        below = []
        for entry in _entries(here, left, base):
            if entry.is_dir():
                if (real := os.path.realpath(entry.path)) not in seen:  # a link may lead back
                    seen.add(real)
                    below.append(Path(entry.path))
            elif Path(entry.name).suffix.lower() in suffixes:
                yield Path(entry.path)
            else:
                kind = Path(entry.name).suffix.lower() or "no suffix"
                left.add(f"files of another kind ({kind})", os.path.relpath(entry.path, base))
        stack += reversed(below)


def split_folders(root: Path, suffixes: Collection[str], left: LeftOut, *, key: str, what: str) -> dict[str, Path]:
    """The folders of the splits in `root`, by the usual names; {} where the classes stand in `root` itself.

    Args:
        root: the set's folder.
        suffixes, left, key, what: as of `class_files`.

    Raises:
        ConfigError: no such folder; two folders for one split; splits without one for training; files that count
            beside the splits.
    """
    if not root.is_dir():
        raise ConfigError(f"{key}: the folder {root} does not exist.")
    found: dict[str, Path] = {}
    others, stray, hidden = [], [], LeftOut()
    for entry in _entries(root, hidden, root):
        if not entry.is_dir():
            if Path(entry.name).suffix.lower() in suffixes:
                stray.append(entry.name)
            continue
        split = split_named(entry.name)
        if split is None:
            others.append(entry.name)
        elif split in found:
            raise ConfigError(
                f"{key}: {found[split].name} and {entry.name} in {root} both name the split {split}; keep one of them."
            )
        else:
            found[split] = Path(entry.path)
    if not found:
        return {}
    if "train" not in found:
        named = ", ".join(path.name for path in found.values())
        raise ConfigError(f"{key}: {root} has {named}, but no folder named train.")
    _refuse_stray(stray, root, key=key, what=what)
    left.merge(hidden)
    for name in others:
        left.add("folders beside the splits", name)
    return found


def _refuse_stray(names: Sequence[str], folder: Path, *, key: str, what: str) -> None:
    if names:
        raise ConfigError(
            f"{key}: {len(names):,} {what}{'s' if len(names) > 1 else ''} in {folder} belong to no class, such as "
            f"{names[0]}; move them into the folder of a class, or away."
        )


def class_files(
    folder: Path, suffixes: Collection[str], left: LeftOut, *, key: str, what: str
) -> dict[str, list[Path]]:
    """The files of every class of a split, sorted: the folders in `folder` are the classes, with all that is in them.

    Args:
        folder: of a split.
        suffixes: of the files that count, lower case, with the dot.
        left: takes what is passed over, folders without a file that counts among it.
        key: of the setting, for messages.
        what: files that count, for messages: "image".

    Raises:
        ConfigError: files that count outside of all classes; a split's folder inside of a class; no class.
    """
    found: dict[str, list[Path]] = {}
    stray = []
    for entry in _entries(folder, left, folder.parent):
        if not entry.is_dir():
            if Path(entry.name).suffix.lower() in suffixes:
                stray.append(entry.name)
            else:
                left.add("files beside the classes", os.path.relpath(entry.path, folder.parent))
            continue
        for inner in os.scandir(entry.path):
            if inner.is_dir() and split_named(inner.name) is not None:
                raise ConfigError(
                    f"{key}: {inner.path} looks like the folder of a split inside of a class. Splits stand above "
                    f"classes: ROOT/train/CLASS. If {entry.path} is the set itself, say {key}={entry.path}."
                )
        files = list(walk(Path(entry.path), suffixes, left, base=folder.parent))
        if files:
            found[entry.name] = files
        else:
            left.add(f"folders without an {what} that can be read", os.path.relpath(entry.path, folder.parent))
    _refuse_stray(stray, folder, key=key, what=what)
    if not found:
        raise ConfigError(f"{key}: no {what}s in {folder}; expected {folder}/CLASS/FILE.")
    return found


def same_classes(
    classes: Collection[str], folders: Mapping[str, Path], found: Mapping[str, Collection[str]], *, key: str
) -> None:
    """Refuse splits whose classes are not those of "train".

    Args:
        classes: of the training split.
        folders: of the splits.
        found: split -> its classes.
        key: of the setting, for messages.

    Raises:
        ConfigError: naming what differs.
    """
    for split, names in found.items():
        odd = sorted(set(names) ^ set(classes))
        if odd and set(names) < set(classes):
            where = folders[split] / odd[0]
            raise ConfigError(
                f"{key}: there is no file or folder {where}, or nothing in it that counts; {folders['train']} has this "
                "class."
            )
        if odd:
            raise ConfigError(f"{key}: classes differ between {folders['train']} and {folders[split]}: {odd[:5]}.")

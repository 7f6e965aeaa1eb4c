"""Mistakes in a part of one's own: docs/mistakes.md makes each of them, and says what is answered, word for word."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mixerzoo import list_mixers, plugins
from mixerzoo.mixers.base import MIXERS
from mixerzoo.training.cli import verb

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "mistakes.md").read_text(encoding="utf-8")
HEAD, *SECTIONS = re.split(r"^## ", PAGE, flags=re.M)


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return found


BASE, KEPT = block(HEAD, "python"), block(HEAD, "text")
CASES = {section.partition("\n")[0]: section for section in SECTIONS}


def applied(changes: str) -> str:
    """The mixer with the changes of a diff, whose pieces have blank lines between them."""
    text = BASE
    for piece in changes.strip("\n").split("\n\n"):
        lines = piece.split("\n")
        old = "".join(line[1:] + "\n" for line in lines if line[:1] in "- ")
        new = "".join(line[1:] + "\n" for line in lines if line[:1] in "+ ")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(plugins.ENVIRONMENT, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "PLUGINS", {})
    monkeypatch.chdir(tmp_path)
    list_mixers()
    parts, mixers, modules = list(plugins.PARTS), dict(MIXERS), set(sys.modules)
    plugins.PARTS[:] = [part for part in parts if part.is_ours]
    for name in set(mixers) - {part.name for part in plugins.PARTS if part.kind == "mixer"}:
        del MIXERS[name]  # what examples of other pages have defined
    yield
    plugins.PARTS[:] = parts
    MIXERS.clear()
    MIXERS.update(mixers)
    for name in set(sys.modules) - modules:
        if name.startswith("mixerzoo_plugin_"):
            del sys.modules[name]


def test_the_mixer_without_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_mixers.py").write_text(BASE)
    assert verb.main(["check", "my_mixers.py"]) == 0
    out = capsys.readouterr().out
    assert re.sub(r"\d+ promises", "26 promises", out, count=1) == KEPT  # more may be added


@pytest.mark.parametrize("title", CASES)
def test_a_mistake_is_answered_in_one_line(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_mixers.py").write_text(applied(block(CASES[title], "diff")))
    assert verb.main(["check", "my_mixers.py"]) in (1, 2)
    told = capsys.readouterr()
    said = [line for line in (told.err + told.out).splitlines() if " promises kept, " not in line]
    assert said == block(CASES[title], "text").splitlines()
    assert len(said) == 1


def test_the_page_is_long_enough() -> None:
    assert len(CASES) >= 20
    assert len(CASES) == len(SECTIONS)

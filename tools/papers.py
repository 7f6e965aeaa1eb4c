"""Papers as mixers, parts, ops and models name them: years, arXiv ids, links."""

from __future__ import annotations

import re

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_YEAR = re.compile(r"\(((?:19|20)\d\d)\b")
_SENTENCE_END = re.compile(r"(?<=[^ ][^.A-Z])\. (?=[A-Z])")  # not that of initials


def arxiv_ids(text: str) -> list[str]:
    """Every arXiv id in a text once, in its order."""
    return list(dict.fromkeys(ARXIV.findall(text)))


def link(identifier: str) -> str:
    """A paper of arXiv as a link in Markdown."""
    return f"[arXiv:{identifier}](https://arxiv.org/abs/{identifier})"


def linked(text: str) -> str:
    """A text with links in place of its arXiv ids."""
    return ARXIV.sub(lambda found: link(found.group(1)), text)


def year(text: str) -> int | None:
    """The first year in brackets, else that of the first arXiv id; None where there is neither."""
    found = _YEAR.search(text)
    if found:
        return int(found.group(1))
    ids = arxiv_ids(text)
    return 2000 + int(ids[0][:2]) if ids else None


def summary(docstring: str | None) -> str:
    """The first sentence of a docstring, on one line, without arXiv ids."""
    first = " ".join((docstring or "").strip().partition("\n\n")[0].split())
    sentence = _SENTENCE_END.split(first)[0].rstrip(".")
    return re.sub(r",? (?=[,.)]|$)", "", ARXIV.sub("", sentence)).rstrip(" ,") + "."

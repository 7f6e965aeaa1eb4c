"""Links that lead to files of the repository, as links of the site."""

from __future__ import annotations

import re

_PAGES = {"CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}


def from_root(text: str) -> str:
    """A page of the repository's root as one beside those of `docs/`: `docs/x.md` is `x.md` there."""
    text = re.sub(r"\]\(docs/mixers\.md#(\w+)\)", r"](mixers/\1.md)", text)
    text = re.sub(r"\]\(docs/models\.md#(\w+)\)", r"](models/\1.md)", text)
    return adapted(re.sub(r"\]\((?:docs/)([^)]+)\)", r"](\1)", text))


def adapted(text: str) -> str:
    """A page of `docs/`: reports are the files that open in a browser, not their text for reading in the repository."""
    text = re.sub(r"(\]\((?:\.\./)?results/\w+/report)\.md\)", r"\1.html)", text)
    for name, page in _PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}(#[^)]*)?\)", rf"]({page}\1)", text)
    return text

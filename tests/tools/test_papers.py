"""Papers are read from docstrings and class data, and every part of ours names one and says what it computes."""

from __future__ import annotations

import inspect

import pytest
from mixerzoo.mixers import mixer_options
from mixerzoo.mixers.registry import list_mixers, mixer_class
from mixerzoo.models.parts.channel_mixers import CHANNEL_MIXERS
from mixerzoo.tools import papers
from mixerzoo.tools.markdown import between, options_table, replaced, type_for_people

OURS = [*map(mixer_class, list_mixers()), *CHANNEL_MIXERS.entries.values()]


@pytest.mark.parametrize("part", OURS, ids=[part.__name__ for part in OURS])
def test_every_part_has_a_paper_and_an_equation(part):
    assert papers.arxiv_ids(part.source), "`source` names no arXiv paper"
    year = papers.year(part.source)
    assert year is not None
    assert abs(year - 2000 - int(papers.arxiv_ids(part.source)[0][:2])) <= 1  # a conference may be a year later
    assert "=" in part.equation
    assert len(part.equation) <= 110
    assert len(papers.summary(inspect.getdoc(part))) <= 115


def test_years_links_and_sentences():
    assert papers.year("Mamba (2023), arXiv:2312.00752") == 2023
    assert papers.year("HISA, arXiv:2603.28458") == 2026
    assert papers.year("no paper") is None
    assert papers.arxiv_ids("a arXiv:2312.00752, b arXiv:2312.00752, c arXiv:1706.03762") == [
        "2312.00752",
        "1706.03762",
    ]
    assert papers.linked("see arXiv:2312.00752.") == "see [arXiv:2312.00752](https://arxiv.org/abs/2312.00752)."
    assert papers.summary("One thing: another.\nMore of it.") == "One thing: another."
    assert papers.summary("Mixes as X et al. (2023) do. Y (2024).\n\nMore.") == "Mixes as X et al. (2023) do."
    assert papers.summary("The mixer of Y (2021, arXiv:2111.11418), on tokens.") == "The mixer of Y (2021), on tokens."
    assert papers.summary("The block of Z (2024), arXiv:2412.09856, for clips.") == "The block of Z (2024), for clips."


def test_types_in_words():
    options = mixer_options("mamba")
    assert type_for_people(options["d_state"].annotation) == "int (at least 1)"
    assert type_for_people(options["dt_rank"].annotation) == "int (at least 1) or null"
    assert type_for_people(mixer_options("shift")["padding"].annotation) == "'zeros' or 'wrap'"
    assert type_for_people(mixer_options("attention")["position"].annotation).endswith("or 'alibi' or null")
    rows = options_table(options, [mixer_class("mamba")]).splitlines()
    assert rows[2] == "| `d_state` | int (at least 1) | `16` | states per inner channel. |"


def test_what_stands_between_marks():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    assert between(text, "x") == "old"
    assert replaced(text, "x", "new") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb"
    with pytest.raises(ValueError, match="y:begin"):
        replaced(text, "y", "new")

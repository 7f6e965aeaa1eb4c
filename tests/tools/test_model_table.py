"""The tables of models in the docs and of parts in the README are what the configurations and classes say."""

from __future__ import annotations

import pytest
from mixerzoo.models import list_models
from mixerzoo.tools import model_table as table
from mixerzoo.tools import readme_tables


@pytest.fixture(scope="module")
def written() -> dict[str, int]:
    return table.counts_in(table.PATH.read_text(encoding="utf-8"))


def test_docs_are_current(written):
    """But for the parameters, which the next tests count anew."""
    assert sorted(written) == list_models(), "run: python -m mixerzoo.tools.model_table"
    assert table.PATH.read_text(encoding="utf-8") == table.render(written), "run: python -m mixerzoo.tools.model_table"


def test_parameters_of_some_models(written):
    some = list_models()[::9]
    assert table.counts(some) == {name: written[name] for name in some}


@pytest.mark.slow
def test_parameters_of_all_models(written):
    assert table.counts() == written


def test_readme_is_current():
    text = readme_tables.PATH.read_text(encoding="utf-8")
    assert text == readme_tables.render(text), "run: python -m mixerzoo.tools.readme_tables"


def test_families_and_their_mixers():
    found = {family.name: family for family in table.families()}
    assert found["caformer"].mixers == ["conv", "attention"]
    assert found["caformer"].papers == ["2210.13452"]
    assert found["hyena"].papers == ["2302.10866"]  # its file names none: that of the mixer
    assert found["hybrid"].kind == "language"
    assert all(family.papers for family in found.values())
    assert table.mixer_names({"mixer": [{"name": "mamba2", "d_state": 8}, "mamba2", "attention"]}) == [
        "mamba2",
        "attention",
    ]
    assert table.large(26_341_656) == "26.3M"
    assert table.large(2_702_599_680) == "2.7B"

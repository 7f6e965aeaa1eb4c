"""The page of claims is what the kept results say."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixerzoo.tools import claims
from mixerzoo.training.ablation.claims import overall
from mixerzoo.training.ablation.preset import list_ablations


def test_the_page_is_up_to_date() -> None:
    text = claims.PAGE.read_text(encoding="utf-8")
    assert claims.render(text) == text, "python -m mixerzoo.tools.claims"


@pytest.mark.parametrize("name", sorted(claims.stored()))
def test_every_kept_result_belongs_to_a_claim_and_decides_its_lines(name: str) -> None:
    assert name in list_ablations("claim")
    found = claims.verdicts(name, claims.stored()[name])
    assert all("missing" not in v["why"] for v in found)
    row = next(line for line in Path(claims.PAGE).read_text(encoding="utf-8").splitlines() if f"**`{name}`**" in line)
    assert f"| **{overall([v['verdict'] for v in found])}** |" in row

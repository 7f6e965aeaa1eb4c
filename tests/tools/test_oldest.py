"""The lowest versions that pyproject.toml allows."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from mixerzoo.tools.oldest import lowest

ROOT = Path(__file__).parents[2]


def test_lowest_versions() -> None:
    extras = {"a": ["third >=2; python_version > '3'", "ruff>=1"], "b": ["first>=1.2", "pinned==3.1"]}
    assert lowest({"dependencies": ["first>=1.2,<2", "se-cond[x]>=0.3"], "optional-dependencies": extras}) == [
        "first==1.2", "pinned==3.1", "se-cond==0.3", "third==2"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'open' .*no lower bound"):
        lowest({"dependencies": ["open"], "optional-dependencies": {}})
    with pytest.raises(ValueError, match=r"first has the lower bounds 1 and 2"):
        lowest({"dependencies": ["first>=1"], "optional-dependencies": {"a": ["first>=2"]}})


def test_ours_have_bounds() -> None:
    found = lowest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    assert {"torch", "triton", "timm", "transformers"} <= {line.partition("==")[0] for line in found}

"""Softmax attention against the official implementations."""

from __future__ import annotations

import pytest
from mixerzoo.mixers.attention import Attention
from mixerzoo.tests.utils import check_golden, load_golden


@pytest.mark.parametrize("name", ["metaformer_attention", "metaformer_attention_official"])
def test_golden(name):
    golden = load_golden(name)
    check_golden(golden, Attention(**golden.kwargs), Attention.convert_official)

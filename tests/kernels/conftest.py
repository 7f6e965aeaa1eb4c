"""Everything that `torch.empty` returns is NaN first. (`tests/conftest.py` turns on Triton's interpreter.)"""

from __future__ import annotations

import pytest
import torch
from mixerzoo.kernels.selftest.check import poisoned


@pytest.fixture(autouse=True)
def poison_empty_tensors():
    """Uninitialised memory is filled with NaN (with the largest value for integers), so that forgetting shows."""
    with poisoned():
        assert torch.empty(3).isnan().all()
        yield

"""Everything that `torch.empty` returns is NaN first. (`tests/conftest.py` turns on Triton's interpreter.)"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_empty_tensors():
    """Uninitialised memory is filled with NaN (with the largest value for integers), so that forgetting shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]

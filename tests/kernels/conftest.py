"""Without a GPU the kernels run in Triton's interpreter, and everything that `torch.empty` returns is NaN first."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel module is imported, which the ops do at their first call
    os.environ.setdefault("TRITON_INTERPRET", "1")


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

"""Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os

import torch

# Before any test module: triton reads this when it is imported, and mixerzoo imports it (through torchvision).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available() and os.environ.setdefault("TRITON_INTERPRET", "1") == "1" and "triton" in sys.modules:
    # pytest has imported the package above this folder, and with it triton
    from mixerzoo.kernels.common.interpreter import interpret_standard_library

    interpret_standard_library()

"""Triton kernels run in Triton's interpreter, on a machine with a GPU, too: what the tests say is the same everywhere.

`MIXERZOO_TEST_GPU=1 pytest -m gpu` runs the few tests that are of a GPU, and those only.
"""

from __future__ import annotations

import os
import sys

on_gpu = os.environ.get("MIXERZOO_TEST_GPU") == "1"
if not on_gpu and os.environ.setdefault("TRITON_INTERPRET", "1") == "1" and "triton" in sys.modules:
    # pytest has imported the package above this folder, and with it triton
    from mixerzoo.kernels.common.interpreter import interpret_standard_library

    interpret_standard_library()

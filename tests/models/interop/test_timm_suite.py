"""timm's own tests of models on ours. Its wheel has none: `MIXERZOO_TIMM_SUITE` is the folder of an unpacked source
distribution (`pip download --no-binary :all: --no-deps timm`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mixerzoo.models import model_config
from mixerzoo.tests.models.interop.timm_suite import FAMILIES, PREFIX

SUITE = os.environ.get("MIXERZOO_TIMM_SUITE", "")
# Of its tests over all models, all but TorchScript's: it compiles the text of every module, and ours look at shapes.
APPLY = [
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
]


@pytest.mark.slow
@pytest.mark.skipif(not SUITE, reason="MIXERZOO_TIMM_SUITE names no source distribution of timm")
@pytest.mark.parametrize("test", APPLY)
def test_of_timm(test: str) -> None:
    file = Path(SUITE) / "tests" / "test_models.py"
    plugin = ["-p", "mixerzoo.tests.models.interop.timm_suite", "-p", "no:cacheprovider", "-q"]
    if test.endswith("_fx"):  # timm's size is another one, and torch.fx cannot size a table of positions by the image
        learned = [f"{PREFIX}{name}]" for name in FAMILIES if model_config(name).get("position") == "learned"]
        plugin += [word for name in learned for word in ("--deselect", f"{file}::{test}[1-{name}")]
        plugin += [word for name in learned for word in ("--deselect", f"{file}::{test}[2-{name}")]
    command = [sys.executable, "-m", "pytest", *plugin, f"{file}::{test}", "--rootdir", SUITE, "-c", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(SUITE).parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

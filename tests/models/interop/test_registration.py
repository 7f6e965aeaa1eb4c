"""Our models are in timm and in transformers after a bare `import mixerzoo`, whichever is imported first.

Each order runs in a process of its own: a module is imported once only.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from mixerzoo.models.interop.on_import import after_import

ROOT = Path(__file__).resolve().parents[3]
OURS = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mixerzoo", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
sys.modules["mixerzoo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["mixerzoo"])
"""
TIMM = "assert timm.create_model('mixerzoo_poolformer_s12', num_classes=3)(torch.ones(1, 3, 64, 64)).shape == (1, 3)"
AUTO = """
from transformers import AutoConfig, AutoModelForCausalLM
options = {"backbone": "language", "vocab_size": 7, "dim": 8, "depth": 1, "mixer": "pooling"}
config = AutoConfig.for_model("mixerzoo", mixerzoo=options)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "MixerZooForCausalLM"
"""


def run(*lines: str, folder: Path) -> str:
    script = "\n".join(["import torch", *lines])
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_import_brings_no_heavy_library(tmp_path: Path) -> None:
    names = "{'timm', 'torchvision', 'transformers', 'datasets', 'hydra', 'accelerate', 'matplotlib', 'pandas'}"
    assert run(OURS, f"print(sorted({names} & set(sys.modules)))", folder=tmp_path) == "[]\n"


@pytest.mark.parametrize(
    "first",
    ["import timm", *[pytest.param(line, marks=pytest.mark.slow) for line in ("import timm.layers", "")]],
)
def test_timm(first: str, tmp_path: Path) -> None:
    run(first, OURS, "import timm", TIMM, folder=tmp_path)


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import PreTrainedModel, AutoModelForCausalLM",
        pytest.param("import transformers", marks=pytest.mark.slow),
    ],
)
def test_transformers_first(first: str, tmp_path: Path) -> None:
    run(first, OURS, AUTO, folder=tmp_path)


@pytest.mark.parametrize(
    "between",
    [
        "",
        "from mixerzoo.models.interop.huggingface import MixerZooForCausalLM",
        *[
            pytest.param(line, marks=pytest.mark.slow)
            for line in (
                "import transformers.generation.utils",  # these import each other, and are imported by ours
                "from transformers import PreTrainedModel",
                "from mixerzoo.models.interop.huggingface_config import MixerZooConfig",
                "from transformers import pipeline",
            )
        ],
    ],
)
def test_mixerzoo_first(between: str, tmp_path: Path) -> None:
    run(OURS, between, AUTO, folder=tmp_path)


def test_a_failure_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong on our side does not take the other library away."""
    (tmp_path / "another_library_for_test.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    done = []
    after_import("another_library_for_test", lambda: done.append(1 / 0))
    after_import("another_library_for_test", lambda: done.append("next"))
    assert not done
    with pytest.warns(UserWarning, match="not registered with another_library_for_test: ZeroDivisionError"):
        library = importlib.import_module("another_library_for_test")
    assert library.value == 3
    after_import("another_library_for_test", lambda: done.append("at once"))
    assert done == ["next", "at once"]


def test_the_folder_kernels_is_hidden_from_transformers(tmp_path: Path) -> None:
    """Where the repository is the current directory, `import kernels` finds ours; transformers looks for another."""
    lines = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", OURS, "import transformers"]
    run(*lines, "assert not transformers.utils.is_kernels_available()", AUTO, folder=tmp_path)

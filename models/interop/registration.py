"""Our models in the registries of timm and transformers, as soon as these are imported, before or after mixerzoo."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .on_import import after_import, before_import

OURS = __name__.rpartition(".")[0]
AUTO = "transformers.models.auto"


def keep_kernels_apart() -> None:
    """Hide this project's folder `kernels` from transformers, which looks for a package of that name.

    The folder can be imported as `kernels` when the repository is the current directory, where Python looks first.
    """
    spec = None if "kernels" in sys.modules else importlib.util.find_spec("kernels")
    if (
        spec is not None
        and spec.origin
        and Path(spec.origin).resolve().parent == Path(__file__).resolve().parents[2] / "kernels"
    ):
        sys.modules["kernels"] = None  # type: ignore[assignment] - the documented way to say "not there"


def _timm() -> None:
    from .timm_registry import register_all

    register_all()


def _configuration() -> None:
    from .huggingface_config import register

    register()


def _models() -> None:
    from .huggingface import register

    register()


if OURS.startswith("mixerzoo."):  # not a second import of the checkout under its folder's name, as pytest does
    before_import("transformers", keep_kernels_apart)
    after_import("timm.models", _timm, not_during=[f"{OURS}.timm_registry"])
    after_import(
        f"{AUTO}.configuration_auto",
        _configuration,
        not_during=["transformers.configuration_utils", f"{OURS}.huggingface_config"],
    )
    after_import(
        f"{AUTO}.modeling_auto",
        _models,
        not_during=["transformers.modeling_utils", "transformers.generation.utils", f"{OURS}.huggingface"],
    )

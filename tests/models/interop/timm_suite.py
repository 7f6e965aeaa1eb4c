"""A plugin for pytest: timm's own tests of all models, as its source distribution has them, on ours.

Its tests are parametrised by `timm.list_models` and build what they test by `timm.create_model`. Here the first gives
one model of each family, and the second builds it narrow and shallow.
"""

from __future__ import annotations

from typing import Any

import timm
from mixerzoo.models import model_config

PREFIX = "mixerzoo_"
FAMILIES = [
    "poolformer_s12", "poolformerv2_s12", "identityformer_s12", "randformer_s12", "convformer_s18", "caformer_s18",
    "vit_tiny_patch16", "mixer_s16", "resmlp_12", "gmlp_ti16", "raftmlp_s", "msmlp_tiny", "stripmlp_tiny_light",
    "gfnet_ti", "afno_b16", "affnet_tiny", "sparsifiner_deit_small", "vmamba_tiny", "vim_tiny", "vim2_tiny",
    "ninformer_cifar",
]  # fmt: skip
_create = timm.create_model


def small(name: str) -> dict[str, Any]:
    """Options that make a model of a family cheap; its images stay as large as they are."""
    config = model_config(name)
    if "dims" in config:
        return {"depths": [1] * len(config["depths"]), "dims": [16 * 2**i for i in range(len(config["dims"]))]}
    return {"depth": 4, "dim": 32}


def _ours(*args: Any, exclude_filters: Any = (), **options: Any) -> list[str]:
    maps_only = "vit_*" in exclude_filters  # timm leaves out its models with a class token so, and tests them elsewhere
    return [PREFIX + n for n in FAMILIES if not (maps_only and model_config(n).get("class_token"))]


def _small_ones(model_name: str, *args: Any, **options: Any) -> Any:
    return _create(model_name, *args, **{**small(model_name.removeprefix(PREFIX)), **options})


def pytest_configure(config: Any) -> None:
    """Before timm's tests are read, in their own process."""
    timm.list_models = _ours
    timm.create_model = _small_ones

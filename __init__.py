"""mixerzoo: interchangeable, verified token mixers; MetaFormer backbones built from configs; fair ablations."""

from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .mixers import Mixer, create_mixer, list_mixers
from .models import create_model, init_weights, list_models, resize_grid

if TYPE_CHECKING:
    from .training.loading import load

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Mixer",
    "__version__",
    "create_mixer",
    "create_model",
    "init_weights",
    "list_mixers",
    "list_models",
    "load",
    "resize_grid",
]


def __getattr__(name: str) -> Any:
    if name == "load":  # what training needs is loaded when it is asked for
        from .training.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

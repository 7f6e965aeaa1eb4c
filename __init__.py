"""mixerzoo: interchangeable, verified token mixers; MetaFormer backbones built from configs; fair ablations."""

from .errors import ConfigError
from .mixers import Mixer, create_mixer, list_mixers
from .models import create_model, list_models, resize_grid

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Mixer",
    "__version__",
    "create_mixer",
    "create_model",
    "list_mixers",
    "list_models",
    "resize_grid",
]

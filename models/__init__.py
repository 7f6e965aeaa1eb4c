"""MetaFormer backbones, models by name, and checkpoints of other sources."""

from . import conversion_metaformer, timm_interop
from .checkpoint import load_into, read_state_dict, save_model
from .registry import build_model, config_of, create_model, list_models, model_config
from .resize import resize_grid

__all__ = [
    "build_model",
    "config_of",
    "conversion_metaformer",
    "create_model",
    "list_models",
    "load_into",
    "model_config",
    "read_state_dict",
    "resize_grid",
    "save_model",
    "timm_interop",
]

"""MetaFormer backbones, models by name, and checkpoints of other sources."""

from .conversion.checkpoint import load_into, read_state_dict, save_model
from .create import create_model
from .generation import generate, pad_prompts
from .initial import init_weights
from .interop import registration  # our models in timm and transformers
from .registry import build_model, config_of, list_models, model_config
from .resize import resize_grid

__all__ = [
    "build_model",
    "config_of",
    "create_model",
    "generate",
    "init_weights",
    "list_models",
    "load_into",
    "model_config",
    "pad_prompts",
    "read_state_dict",
    "registration",
    "resize_grid",
    "save_model",
]

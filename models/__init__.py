"""MetaFormer backbones, models by name, and checkpoints of other sources."""

from . import (
    block_variants,
    conversion_fourier,
    conversion_language,
    conversion_metaformer,
    conversion_mlp,
    conversion_ssm,
    fourier_blocks,
    mamba_mixer,
    mobile_parts,
    timm_interop,
    token_pruning,
    video_parts,
)
from .checkpoint import load_into, read_state_dict, save_model
from .generation import generate, pad_prompts
from .registry import build_model, config_of, create_model, list_models, model_config
from .resize import resize_grid

__all__ = [
    "block_variants",
    "build_model",
    "config_of",
    "conversion_fourier",
    "conversion_language",
    "conversion_metaformer",
    "conversion_mlp",
    "conversion_ssm",
    "create_model",
    "fourier_blocks",
    "generate",
    "list_models",
    "load_into",
    "mamba_mixer",
    "mobile_parts",
    "model_config",
    "pad_prompts",
    "read_state_dict",
    "resize_grid",
    "save_model",
    "timm_interop",
    "token_pruning",
    "video_parts",
]

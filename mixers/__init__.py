"""Token mixers behind one contract. See `base.Mixer`."""

from .base import Grid, Mixer
from .registry import create_mixer, list_mixers, mixer_class, mixer_options

__all__ = ["Grid", "Mixer", "create_mixer", "list_mixers", "mixer_class", "mixer_options"]

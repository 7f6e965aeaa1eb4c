"""Token mixers behind one contract. See `base.Mixer`."""

from .base import Grid, Mixer
from .losses import aux_loss, collect_losses
from .registry import create_mixer, list_mixers, mixer_class, mixer_options

__all__ = ["Grid", "Mixer", "aux_loss", "collect_losses", "create_mixer", "list_mixers", "mixer_class", "mixer_options"]

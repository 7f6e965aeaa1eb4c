"""Backbones: the vision pyramid, the isotropic one, and language."""

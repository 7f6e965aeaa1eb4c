"""Backbones by name. A class has `config_class`, a dataclass, and is built from an instance of it."""

from __future__ import annotations

from ...schema import Parts

BACKBONES = Parts("backbone", __name__)

"""Mixers with a state: selective state spaces, linear attention, the delta rule."""

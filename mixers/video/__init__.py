"""Mixers of video: grids of frames (T, H, W)."""

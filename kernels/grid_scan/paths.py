"""How a path reads an image, line after line."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinePath(NamedTuple):
    """How one path reads an image: its columns in place of its rows; the lines from the last one; each from its end."""

    columns: bool
    last_line_first: bool
    from_its_end: bool

    @property
    def code(self) -> int:
        return self.columns + 2 * self.last_line_first + 4 * self.from_its_end

    @classmethod
    def decode(cls, code: int) -> LinePath:
        return cls(bool(code & 1), bool(code & 2), bool(code & 4))

    def backwards(self) -> LinePath:
        return LinePath(self.columns, not self.last_line_first, not self.from_its_end)

    def index(self, height: int, width: int, device: torch.device) -> Tensor:
        """The tokens in the order of the path, (H W,), as places in raster order."""
        places = torch.arange(height * width, device=device).view(height, width)
        lines = places.T if self.columns else places
        if self.last_line_first:
            lines = lines.flip(0)
        return (lines.flip(1) if self.from_its_end else lines).flatten()

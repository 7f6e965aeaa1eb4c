"""What an op must at least move and compute: arithmetic for roofline tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GPUS = {
    # name: (memory bandwidth in bytes/s, dense bf16 matmul flops/s, fp32 non-matmul flops/s), from the data sheets
    "A100": (2.039e12, 312e12, 19.5e12),  # A100 SXM 80 GB
    "H100": (3.35e12, 989e12, 67e12),  # H100 SXM 80 GB
}


@dataclass(frozen=True)
class Cost:
    """Compulsory cost of one call at one model size.

    Attributes:
        label: op and pass and size, e.g. `"selective_scan forward"`.
        size: the model and shapes in words.
        bytes: each input read once, each output and gradient written once.
        matmul: flops on matrix units (2 per multiply-add).
        other: flops elsewhere (exponentials count as one).
    """

    label: str
    size: str
    bytes: int
    matmul: int = 0
    other: int = 0

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return (self.matmul + self.other) / self.bytes

    def floor(self, gpu: str) -> tuple[float, str]:
        """Seconds below which no kernel can go on `gpu`, and what binds: memory, matmul or arithmetic."""
        bandwidth, matmul, other = GPUS[gpu]
        times = {"memory": self.bytes / bandwidth, "matmul": self.matmul / matmul, "arithmetic": self.other / other}
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)

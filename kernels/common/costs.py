"""What an op must at least move and compute: arithmetic for roofline tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GPUS = {
    # name: memory bandwidth in bytes/s, dense bf16 matmul flops/s, fp32 non-matmul flops/s, from the data sheets; and
    # exponentials/s: 16 in a clock and multiprocessor (CUDA C++ Programming Guide, throughput of instructions)
    "A100": (2.039e12, 312e12, 19.5e12, 16 * 108 * 1.41e9),  # A100 SXM 80 GB
    "H100": (3.35e12, 989e12, 67e12, 16 * 132 * 1.98e9),  # H100 SXM 80 GB
    "H200": (4.8e12, 989e12, 67e12, 16 * 132 * 1.98e9),
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
        exponentials: exp, log and the like, which have units of their own.
    """

    label: str
    size: str
    bytes: int
    matmul: int = 0
    other: int = 0
    exponentials: int = 0

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return (self.matmul + self.other) / self.bytes

    def floor(self, gpu: str) -> tuple[float, str]:
        """Seconds below which no kernel can go on `gpu`, and what binds: memory, matmul, arithmetic or exponentials."""
        counts = {
            "memory": self.bytes,
            "matmul": self.matmul,
            "arithmetic": self.other,
            "exponentials": self.exponentials,
        }
        times = {name: count / rate for (name, count), rate in zip(counts.items(), GPUS[gpu], strict=True)}
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)

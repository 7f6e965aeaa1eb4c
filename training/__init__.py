"""Training: the loop, checkpoints, costs and reports."""

from .cost import count_parameters, measure_activation_bytes, measure_flops, measure_throughput, peak_memory_bytes

__all__ = [
    "count_parameters",
    "measure_activation_bytes",
    "measure_flops",
    "measure_throughput",
    "peak_memory_bytes",
]

"""Training: the loop, checkpoints, costs, reports and ablations."""

from typing import TYPE_CHECKING, Any

from .cost import count_parameters, measure_activation_bytes, measure_flops, measure_throughput, peak_memory_bytes

if TYPE_CHECKING:
    from .ablation.compare import compare

__all__ = [
    "compare",
    "count_parameters",
    "measure_activation_bytes",
    "measure_flops",
    "measure_throughput",
    "peak_memory_bytes",
]


def __getattr__(name: str) -> Any:
    if name == "compare":  # what it needs takes seconds to import
        from .ablation.compare import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

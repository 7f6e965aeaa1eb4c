"""What a module costs: parameters, FLOPs, activation memory, peak memory, throughput.

Axis letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..kernels.common.registration import IMPLEMENTATIONS

aten = torch.ops.aten


def count_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters, shared ones once; only those that require gradients when `trainable`."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


# -- FLOPs


def _fft_flops(size: Sequence[int], dim: Sequence[int], *, real: bool) -> int:
    # Split-radix and its kin need about 5 n log2 n operations for n complex points; a real transform half of that.
    n = math.prod(size[d] for d in dim)
    return round((2.5 if real else 5.0) * math.prod(size) * math.log2(n)) if n > 1 else 0


def _r2c(x: Sequence[int], dim: Sequence[int], *_: Any, **__: Any) -> int:
    return _fft_flops(x, dim, real=True)


def _c2r(x: Sequence[int], dim: Sequence[int], normalization: int, last_dim_size: int, **_: Any) -> int:
    full = list(x)
    full[dim[-1]] = last_dim_size
    return _fft_flops(full, dim, real=True)


def _c2c(x: Sequence[int], dim: Sequence[int], *_: Any, **__: Any) -> int:
    return _fft_flops(x, dim, real=False)


def _sdpa(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    *batch, n, d = q
    return 2 * math.prod(batch) * n * k[-2] * (d + v[-1])


def _sdpa_backward(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any
) -> int:
    *batch, n, d = q
    return (
        2 * math.prod(batch) * n * k[-2] * (3 * d + 2 * v[-1])
    )  # scores again, and a gradient to each of five operands


# PyTorch's counter knows matrix products, convolutions and the attention kernels of GPUs.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten._fft_r2c: _r2c,
    aten._fft_c2r: _c2r,
    aten._fft_c2c: _c2c,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}

# Operations per element of the input, for what is neither pointwise nor a matrix product. Moving data costs none.
_PER_INPUT_ELEMENT = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "argmax", "cumsum", "cumprod", "prod", "cummax"), 1),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean", "linalg_vector_norm", "logcumsumexp", "logsumexp"), 3),
    **dict.fromkeys(("_softmax", "_log_softmax", "_fused_rms_norm"), 4),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"), 6),
}
_FREE = {"clone", "_to_copy", "copy_", "where", "alias", "fill_", "masked_fill", "masked_fill_", "lift_fresh"}


def _kernel_volume(kernel: int | Sequence[int], axes: int) -> int:
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    return math.prod(sizes * axes if len(sizes) == 1 else sizes)


def _matrix_counter() -> FlopCounterMode:
    # our own operators are looked into, so their formulas would count twice
    ours = {op: _no_flops for op in flop_registry if getattr(op, "_qualified_op_name", "").startswith("mixerzoo::")}
    return FlopCounterMode(display=False, custom_mapping=FORMULAS | ours)


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


class _Elementwise(TorchDispatchMode):
    """Counts operations that are not matrix products, one per element of a pointwise result, and looks into our ops.

    Attributes:
        total: of these operations.
        matrix: FLOPs of matrix products inside of our own operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.matrix = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        implementation = IMPLEMENTATIONS.get(getattr(func, "name", str)().partition(".")[0])
        if implementation is not None:
            with self, _matrix_counter() as inside:
                out = implementation(*args, **(kwargs or {}))
            self.matrix += inside.get_total_flops()
            return out
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name in _PER_INPUT_ELEMENT and isinstance(args[0], Tensor):
            self.total += _PER_INPUT_ELEMENT[name] * args[0].numel()
        elif name.startswith(("avg_pool", "max_pool")) and "backward" not in name:
            result = out[0] if isinstance(out, tuple) else out
            self.total += result.numel() * _kernel_volume(args[1], int(name[name.index("pool") + 4]))
        elif torch.Tag.pointwise in getattr(func, "tags", ()) and name not in _FREE:
            result = out[0] if isinstance(out, (tuple, list)) else out
            if isinstance(result, Tensor):
                self.total += result.numel() * (4 if result.is_complex() and name.startswith("mul") else 1)
        return out


@contextlib.contextmanager
def _eager_kernels() -> Iterator[None]:
    """Count the PyTorch path of our ops whatever the device, so that figures do not depend on where they were taken."""
    before = os.environ.get("MIXERZOO_KERNELS")
    if before in (None, "auto", "triton"):
        os.environ["MIXERZOO_KERNELS"] = "eager"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MIXERZOO_KERNELS", None)
        else:
            os.environ["MIXERZOO_KERNELS"] = before


def measure_flops(module: Callable[..., Any], *inputs: Any, elementwise: bool = True, **kwargs: Any) -> int:
    """Floating-point operations of one forward pass, 2 per multiply-add.

    Matrix products, convolutions and attention are counted by PyTorch's `FlopCounterMode`, FFTs as 5 n log2 n (2.5 when
    real). Causal attention counts in full, as there. Our own ops are counted on their PyTorch path on every device.

    Args:
        module: a module or a function; it is run once, without gradients, in the mode it is in.
        inputs: its arguments, on its device.
        elementwise: also count pointwise operations (1 per element), norms, softmax, pooling and scans, without which
            mixers such as pooling or a state-space scan would seem free. Published figures leave them out:
            `elementwise=False` compares with those.
        kwargs: keyword arguments of `module`.
    """
    other, matrix = _Elementwise(), _matrix_counter()
    # the counter's tracker fails on a view that has no gradient of a tensor that wants one
    given = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
    with torch.no_grad(), _eager_kernels(), other, matrix:
        module(*given, **kwargs)
    return int(matrix.get_total_flops()) + other.matrix + (other.total if elementwise else 0)


# -- memory


def measure_activation_bytes(module: Callable[..., Any], *inputs: Any, **kwargs: Any) -> int:
    """Bytes that one forward pass keeps for its backward pass, parameters and buffers not counted.

    Every storage counts once, however many views of it are saved. Floating-point inputs are made to require gradients,
    as they would in the middle of a network, and count when they are saved. Tensors that a custom autograd function
    hides from `save_for_backward` are not seen.

    Args:
        module: a module or a function; it is run once, in the mode it is in.
        inputs: its arguments.
        kwargs: keyword arguments of `module`.
    """
    known: set[int] = set()
    if isinstance(module, nn.Module):
        known = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage could give its address to another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def as_input(value: Any) -> Any:
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            return value.detach().requires_grad_()
        return value

    arguments = [as_input(v) for v in inputs]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*arguments, **kwargs)
    return sum(saved.values())


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Peak memory so far: allocated on a CUDA device since `reset_peak_memory`, resident of the process elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Start `peak_memory_bytes` anew on a CUDA device; a process's resident peak cannot be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# -- speed


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of some measurements: `{"median", "p25", "p75", "count"}`."""
    if len(values) < 2:
        only = float(values[0]) if values else float("nan")
        return {"median": only, "p25": only, "p75": only, "count": len(values)}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high, "count": len(values)}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_throughput(
    function: Callable[[], Any], count: int, *, repeats: int = 10, warmup: int = 2
) -> dict[str, float]:
    """Throughput of a function in units per second, with its spread.

    Args:
        function: does the work once, e.g. `lambda: model(x)`.
        count: units of work in one call (images, tokens).
        repeats: timed calls.
        warmup: calls before.

    Returns:
        `{"median", "p25", "p75", "count"}` of units per second over the timed calls.
    """
    for _ in range(warmup):
        function()
    rates = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        function()
        _synchronise()
        rates.append(count / (time.perf_counter() - start))
    return spread(rates)

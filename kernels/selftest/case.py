"""What an op looks like from outside, stated once: a `Case`.

`kernels/<op>/cases.py` holds `CASES`, one `Case` for each public function of the op. The interpreted tests, the build,
the count of traffic, the GPU benchmark, the roofline and the self-test all call the op through it, so that a new op
is a new folder and nothing else.

Sizes ("dims") are named by letters, and every case has B, the batch: the rows of a batch must not depend on each other.
Where there is a length in time, it is L.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from .comparison import Inputs, evaluate, is_float

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Draw:
    """Random inputs. The same seed gives the same numbers on one kind of device.

    Attributes:
        device: where the tensors lie; `"meta"` for sizes alone.
        dtype: of what the call to be tested varies; complex numbers are always complex64.
        seed: of the generator.
        fill: False leaves memory as it is, for whoever needs sizes and addresses only.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    fill: bool = True
    generator: torch.Generator | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.fill = self.fill and self.device != "meta"
        if self.fill:
            self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        dtype = dtype or self.dtype
        if not self.fill:
            return torch.empty(shape, device=self.device, dtype=dtype)
        wide = dtype if dtype.is_complex else torch.float32
        return torch.randn(shape, device=self.device, dtype=wide, generator=self.generator).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers in 0..1: gates, and the negative of the logarithms of decays."""
        if not self.fill:
            return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return torch.rand(shape, device=self.device, generator=self.generator).to(dtype or self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Normal numbers, the vectors of the last axis scaled to length 1: keys."""
        x = self.normal(*shape)
        return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) if self.fill else x

    def mask(self, *shape: int) -> Tensor:
        """(B, ...) bool, three quarters True."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed)).lt(0.75).to(self.device)

    def documents(self, batch: int, length: int) -> Tensor:
        """(B, L) ids that change after 3 tokens and every 17 from then on, shifted from row to row."""
        places = torch.arange(length) + 14 + 5 * torch.arange(batch)[:, None]
        return (places // 17 % 3).to(self.device)

    def offsets(self, length: int) -> Tensor:
        """(S + 1,) offsets of sequences: of 3 tokens, of none, and then of 17."""
        return torch.tensor([0, min(3, length), *range(3, length, 17), length]).to(self.device)


class Flops(NamedTuple):
    """Operations that a call cannot do without.

    matmul: on matrix units, 2 per multiply-add. other: elsewhere. exponentials: exp, log, tanh ... (also in `other`).
    """

    matmul: int = 0
    other: int = 0
    exponentials: int = 0


@dataclass(frozen=True)
class Size:
    """A call small enough for Triton's interpreter (about a second).

    Attributes:
        dims: for `Case.inputs`.
        dtype: of the inputs.
        backward: whether gradients are taken.
    """

    dims: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True


@dataclass(frozen=True)
class Case:
    """One public function of an op.

    Attributes:
        run: the function; takes what `inputs` returns by name, and `backend`.
        inputs: `inputs(draw, **dims)` -> arguments by name: tensors, None, or options.
        like: names of the arguments that have the sizes and dtypes of the outputs.
        flops: `flops(backward, **dims)`; forward, or forward and backward.
        small: calls by name, for the build and the count of traffic.
        odd: dims that fit no block, for tests on the interpreter and on a GPU; the first one is also run with inputs
            that are contiguous in no axis.
        models: dims of published models, by their names and sizes in words.
        dtypes: what `run` takes.
        gradients: False for steps, which have none on Triton.
        asked: `asked(arguments, outputs, backward)`: bytes that kernels must ask for, where tiles read inputs again by
            the nature of the op. By default every input, output and gradient once.
    """

    run: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    like: tuple[str, ...]
    flops: Callable[..., Flops]
    small: Mapping[str, Size]
    odd: tuple[Mapping[str, Any], ...]
    models: Mapping[str, Mapping[str, Any]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    gradients: bool = True
    asked: Callable[..., int] | None = None

    @property
    def name(self) -> str:
        """Of the public function."""
        return self.run.__name__

    def launch(self, size: Size) -> dict[str, int]:
        """Run a small call on Triton; returns its compulsory bytes and minimal flops of matrix products."""
        inputs = self.inputs(Draw(dtype=size.dtype), **size.dims)
        found = evaluate(self.run, inputs, gradients=size.backward and self.gradients, backend="triton")
        outputs = [y for name, y in found.items() if name.startswith("output")]
        grads = [g for name, g in found.items() if name.startswith("gradient")]
        backward = bool(grads)
        if self.asked is not None:
            needed = self.asked(inputs, outputs, backward)
        else:  # with gradients those of the outputs are read, too
            needed = nbytes(*tensors(inputs), *outputs, *outputs * backward, *grads)
        return {"bytes": needed, "flops": self.flops(backward, **size.dims).matmul}

    def costs(self) -> list[Cost]:
        """Compulsory costs at the sizes of models, in bfloat16: forward, and forward with backward."""
        passes = (False, True)[: 1 + self.gradients]
        return [self.cost(size, dims, backward) for size, dims in self.models.items() for backward in passes]

    def cost(self, size: str, dims: Mapping[str, Any], backward: bool) -> Cost:
        """Compulsory costs at some dims, which `size` describes."""
        inputs = self.inputs(Draw("meta"), **dims)
        outputs = [inputs[name] for name in self.like]
        label = f"{self.name}{' with backward' if backward else ' forward' if self.gradients else ''}"
        once = nbytes(*tensors(inputs), *outputs)
        again = nbytes(*(x for x in tensors(inputs) if is_float(x)), *outputs) if backward else 0
        return Cost(label, size, once + again, *self.flops(backward, **dims))


def tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors among arguments."""
    return [x for x in inputs.values() if isinstance(x, Tensor)]

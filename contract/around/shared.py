"""What parts of many kinds promise alike: norms and activations, channel mixers, blocks, stems, fusions, heads.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...mixers.part import stated
from ...schema import Parts, keyword_options
from ..base import at_the_smallest, kind_of_part, promise, require
from ..losses import check_losses, losses_of
from ..modules import check_adapters, check_hooks
from ..tools import ROUNDED, Grid, other_values, perturbed

DIM = 32


@dataclass(frozen=True)
class Kind:
    """How the parts of a kind are built and called.

    Attributes:
        name: of the kind, that of its registry with `_` for spaces.
        parts: the registry.
        grids: for each rank grids to try, the smallest first.
        make: name, grid and options -> the part, with its own initial values.
        inputs: the part, a batch size and a grid -> its input `(B, *grid, C)`.
        call: the part and its input -> what it makes of it, one tensor whose first axis is the batch.
        shape: the part and its input -> the shape that must come out.
        ranks: name -> the ranks of grid that the part is tried on; by default its `axes`.
    """

    name: str
    parts: Parts
    grids: Mapping[int, tuple[Grid, ...]]
    make: Callable[..., nn.Module]
    inputs: Callable[[nn.Module, int, Grid], Tensor]
    call: Callable[[nn.Module, Tensor], Tensor]
    shape: Callable[[nn.Module, Tensor], tuple[int, ...]]
    ranks: Callable[[str], Sequence[int]] | None = None

    def names(self) -> list[str]:
        return list(self.parts.entries)

    def entry(self, name: str) -> Any:
        """The class or function of a name."""
        return self.parts.entries[name]

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """Options that should have an effect: (default, another value)."""
        part = self.entry(name)
        options = keyword_options(part, self.parts.reserved)
        return other_values(options, stated(part, "alternatives"), stated(part, "inert"))

    def all_grids(self, name: str) -> Iterator[tuple[Grid, ...]]:
        return (self.grids[rank] for rank in self.ranks_of(name))

    def ranks_of(self, name: str) -> Sequence[int]:
        """The ranks of grid on which a part is tried."""
        if self.ranks is not None:
            return self.ranks(name)
        return [rank for rank in stated(self.entry(name), "axes") if rank in self.grids]

    def last_grid(self, name: str) -> Grid:
        """The largest grid of the highest rank."""
        return self.grids[self.ranks_of(name)[-1]][-1]

    def build(self, name: str, grid: Grid, **options: Any) -> nn.Module:
        """The part, with noise on what it learns, in evaluation mode."""
        torch.manual_seed(0)
        return perturbed(self.make(name, grid, **options)).eval()


class Called(nn.Module):
    """A part as a module that is called with one tensor."""

    def __init__(self, kind: Kind, part: nn.Module) -> None:
        super().__init__()
        self.kind, self.part = kind, part

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.call(self.part, x)


def _class_data_are_stated(kind: Kind, name: str) -> None:
    part = kind.entry(name)
    axes = set(stated(part, "axes"))
    require(axes <= {1, 2, 3} and kind.ranks_of(name), "`axes` are ranks of grids.", axes=sorted(axes))
    options = keyword_options(part, kind.parts.reserved)
    unknown = sorted(set(stated(part, "alternatives")) - set(options) - set(kind.parts.context))
    require(not unknown, "`alternatives` names options that do not exist.", options=unknown)
    kind.options(name)


def _trained_alone(part: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of parameters that auxiliary losses alone train."""
    return tuple(start for starts in losses_of(part).values() for start in starts) or ("\0",)


def _shape_dtype_and_gradients(kind: Kind, name: str) -> None:
    for grids in kind.all_grids(name):
        for dtype in (torch.float32, torch.bfloat16):
            grid = grids[-1]
            part = kind.build(name, grid).to(dtype)
            x = kind.inputs(part, 2, grid).to(dtype).requires_grad_()
            y = kind.call(part, x)
            told = {"grid": grid, "dtype": dtype}
            shape = kind.shape(part, x)
            require(tuple(y.shape) == shape, "Another shape comes out.", got=tuple(y.shape), expected=shape, **told)
            require(y.dtype == dtype, "The dtype is changed.", got=y.dtype, **told)
            require(y.isfinite().all(), "The output is not finite.", **told)
            require(y.requires_grad, "The output has no gradient.", **told)
            y.float().square().sum().backward()
            for key, parameter in (("input", x), *part.named_parameters()):
                if key.startswith(_trained_alone(part)):
                    continue
                grad = parameter.grad
                require(grad is not None and grad.isfinite().all(), "No finite gradient.", of=key, **told)


def _samples_mix_as_stated(kind: Kind, name: str) -> None:
    mixes = stated(kind.entry(name), "mixes_batch")
    for grids in kind.all_grids(name):

        def check(grid: Grid) -> None:
            for training in (False, True):
                part = kind.build(name, grid).train(training)
                x = kind.inputs(part, 3, grid).requires_grad_()
                (grad,) = torch.autograd.grad(kind.call(part, x)[0].square().sum(), x)
                seen, largest = float(grad[1:].abs().max()), float(grad.abs().max())
                told = {"grid": grid, "training": training}
                if mixes and training:
                    require(seen > 0, "`mixes_batch` is stated, but no other sample is seen.", **told)
                else:
                    require(seen <= ROUNDED * largest, "Samples are mixed, which `mixes_batch` does not say.", **told)

        at_the_smallest(check, grids)


def _the_same_weights_give_the_same_numbers(kind: Kind, name: str) -> None:
    grid = kind.last_grid(name)
    first, second = kind.build(name, grid), perturbed(kind.build(name, grid), seed=5)
    x = kind.inputs(first, 2, grid)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        y = kind.call(first, x)
        require(torch.equal(kind.call(first, x), y), "Two calls differ.", grid=grid)
        require(torch.equal(kind.call(second, x), y), "The state dict does not hold everything.", grid=grid)


def differ(kind: Kind, name: str, grid: Grid, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of options give other outputs or parameters."""
    seen = []
    for options in (one, other):
        made = kind.build(name, grid, **options).train()
        x = 0.3 * kind.inputs(made, 2, grid)
        torch.manual_seed(5)
        with torch.no_grad():
            kind.call(made, x)  # what a norm keeps of a batch counts too
            kept = kind.call(made, x)
            seen.append((kept, kind.call(made.eval(), x), [tuple(p.shape) for p in made.parameters()]))
    (a, b, shapes), (c, d, others) = seen
    return shapes != others or not (torch.equal(a, c) and torch.equal(b, d))


def _every_option_has_an_effect(kind: Kind, name: str) -> None:
    for option, (_, value) in kind.options(name).items():
        given = dict(stated(kind.entry(name), "requires").get(option, {}))
        changed = differ(kind, name, kind.last_grid(name), given, {**given, option: value})
        require(changed, "An option has no effect.", option=option, value=value, beside=given)


def _auxiliary_losses_are_stated(kind: Kind, name: str) -> None:
    grid = kind.last_grid(name)
    part = kind.build(name, grid)
    x = kind.inputs(part, 2, grid)
    check_losses(part, lambda: kind.call(part, x), known=losses_of(part))


def _layers_are_called(kind: Kind, name: str) -> None:
    grid = kind.last_grid(name)
    part = Called(kind, kind.build(name, grid)).eval()
    x = kind.inputs(part.part, 2, grid)
    check_hooks(part, x.clone().requires_grad_(), untrained=_trained_alone(part))
    check_adapters(part, x, untrained=_trained_alone(part))


SHARED: dict[str, tuple[Callable[[Kind, str], None], str]] = {
    "class_data_are_stated": (_class_data_are_stated, "Class data and options are what the kind needs."),
    "shape_dtype_and_gradients": (
        _shape_dtype_and_gradients,
        "The right shape comes out in the dtype that went in, and gradients reach everything, in float32 and bfloat16.",
    ),
    "samples_mix_as_stated": (
        _samples_mix_as_stated,
        "By gradient, samples see each other exactly in training and if `mixes_batch`.",
    ),
    "the_same_weights_give_the_same_numbers": (
        _the_same_weights_give_the_same_numbers,
        "Two calls agree exactly, and so does another part after `load_state_dict`.",
    ),
    "every_option_has_an_effect": (
        _every_option_has_an_effect,
        "Each option changes the output or the parameters, unless it is declared inert.",
    ),
    "auxiliary_losses_are_stated": (
        _auxiliary_losses_are_stated,
        "In training the part adds the losses of `aux_losses` and no others, and they train what it says.",
    ),
    "layers_are_called": (
        _layers_are_called,
        "A hook on every leaf module fires, and an adapter on every linear layer changes the output and trains.",
    ),
}


def share(kind: Kind) -> None:
    """Make a kind known, with the promises that all of them share."""
    kind_of_part(kind.name, kind.names)
    for name, (body, statement) in SHARED.items():
        _enter(kind, name, body, statement)


def _enter(kind: Kind, name: str, body: Callable[[Kind, str], None], statement: str) -> None:
    def check(part: str) -> None:
        body(kind, part)

    check.__name__, check.__doc__ = name, statement
    promise(kind.name)(check)

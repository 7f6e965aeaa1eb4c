"""What every token mixer promises as a module of PyTorch: hooks, adapters, `torch.func`, copies, quantisation, moves.

All of these hang on layers being called, and on nobody reading another module's weight.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..mixers import Mixer, mixer_class
from .base import promise, require
from .mixers import DIM, GRIDS, KIND, build, trained_alone
from .tools import CLOSE, Grid, error, near, perturbed, tokens


def small_grid(name: str) -> Grid:
    """A small grid of the lowest rank that the mixer takes."""
    return GRIDS[mixer_class(name).axes[0]][-1]


def _case(name: str) -> tuple[Mixer, Tensor]:
    grid = small_grid(name)
    return perturbed(build(name, grid), std=0.1), tokens(2, *grid, DIM)


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    """Modules without children, by name, but for those that are there for parameters or as a placeholder."""
    return {
        name: child
        for name, child in module.named_modules()
        if name and not list(child.children()) and not isinstance(child, (nn.ParameterList, nn.ParameterDict))
    }


def check_hooks(module: nn.Module, *inputs: Any, untrained: tuple[str, ...] = ()) -> None:
    """Forward and backward hooks on every leaf module fire when the module runs forward and backward."""
    watched = {name: leaf for name, leaf in leaves(module).items() if not name.startswith(untrained)}
    forward, backward, handles = set(), set(), []
    for name, leaf in watched.items():
        handles.append(leaf.register_forward_hook(lambda *_, name=name: forward.add(name)))
        if any(p.requires_grad for p in leaf.parameters()):
            handles.append(leaf.register_full_backward_hook(lambda *_, name=name: backward.add(name)))
    try:
        module(*inputs).float().square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    silent = sorted(set(watched) - forward)
    require(not silent, "No forward hook fires.", of=silent)
    expected = {name for name, leaf in watched.items() if any(p.requires_grad for p in leaf.parameters())}
    silent = sorted(expected - backward)
    require(not silent, "No backward hook fires.", of=silent)


class LowRank(nn.Module):
    """A linear layer with a low-rank addition, as an adapter has it: `base(x) + up(down(x))`."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def linears(module: nn.Module, untrained: tuple[str, ...] = ()) -> list[str]:
    """Names of all linear layers."""
    found = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return [name for name in found if name and not name.startswith(untrained)]


def check_adapters(module: nn.Module, *inputs: Any, untrained: tuple[str, ...] = ()) -> None:
    """Each linear layer, replaced by one with a low-rank addition, changes the output, and the addition trains."""
    with torch.no_grad():
        plain = module(*inputs)
    for name in linears(module, untrained):
        parent = module.get_submodule(name.rpartition(".")[0])
        base = module.get_submodule(name)
        setattr(parent, name.rpartition(".")[2], adapter := LowRank(base))  # type: ignore[arg-type]
        y = module(*inputs)
        require(error(y, plain) > 0, "An adapter changes nothing.", layer=name)
        y.float().square().sum().backward()
        for weight in (adapter.up.weight, adapter.down.weight):
            trains = weight.grad is not None and bool(weight.grad.abs().max() > 0)
            require(trains, "An adapter does not train.", layer=name)
        setattr(parent, name.rpartition(".")[2], base)


def check_parametrize(module: nn.Module, *inputs: Any, untrained: tuple[str, ...] = ()) -> None:
    """A parametrisation of any linear layer's weight is honoured."""

    class Flipped(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    with torch.no_grad():
        plain = module(*inputs)
        for name in linears(module, untrained):
            layer = module.get_submodule(name)
            parametrize.register_parametrization(layer, "weight", Flipped())
            require(error(module(*inputs), plain) > 0, "A parametrisation changes nothing.", layer=name)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        require(torch.equal(module(*inputs), plain), "Without parametrisations the output is another one.")


def check_copies(module: nn.Module, *inputs: Any) -> None:
    """`copy.deepcopy` and `pickle` give modules with the same outputs."""
    with torch.no_grad():
        plain = module(*inputs)
        for how, other in (("deepcopy", copy.deepcopy(module)), ("pickle", pickle.loads(pickle.dumps(module)))):
            require(torch.equal(other(*inputs), plain), "A copy gives another output.", how=how)


def check_quantised(module: nn.Module, *inputs: Any) -> None:
    """`quantize_dynamic` of the linear layers runs, and stays within a quarter of the output."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, which not everybody has
        plain = module(*inputs)
        small = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
        y = small(*inputs)
    require(y.isfinite().all(), "The quantised output is not finite.")
    off = float((y - plain).norm() / plain.norm())
    require(off < 0.25, "The quantised output is far off.", relative=off)


def check_functional_call(module: nn.Module, *inputs: Any) -> None:
    """`functional_call` uses the weights that it is given."""
    halved = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
        weights = {name: 0.5 * parameter for name, parameter in module.named_parameters()}
        y = torch.func.functional_call(module, weights, inputs)
        near(y, halved(*inputs), "`functional_call` does not use the weights given.", tolerance=1e-5)


def check_meta(module: nn.Module, make: Any) -> None:
    """Built on the meta device, emptied and reset, no parameter or buffer is left without a value."""
    with torch.device("meta"):
        made = make()
    made.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    made.reset_parameters()
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        require(not tensor.isnan().any(), "`reset_parameters` leaves a value out.", of=name)
    for (name, a), (_, b) in zip(made.named_buffers(), module.named_buffers(), strict=True):
        require(a.shape == b.shape and a.dtype == b.dtype, "A buffer is another one.", of=name)


REFUSALS = (RuntimeError, NotImplementedError, ValueError)  # a ConfigError is one


def check_per_sample_gradients(module: nn.Module, x: Tensor) -> None:
    """`vmap(grad)` over a batch gives input and parameters the gradients that samples give one after another."""
    module, x = module.double(), x.double()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(module, given, (sample[None],)).square().sum()

    given = {name: p.detach() for name, p in trained.items()}
    of_given, of_input = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(given, x)
    together = {**of_given, "input": of_input}
    for i, sample in enumerate(x):
        leaves = {**trained, "input": sample.clone().requires_grad_()}
        y = module(leaves["input"][None]).square().sum()
        found = torch.autograd.grad(y, list(leaves.values()), allow_unused=True)
        alone = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found, strict=True)}
        largest = max(float(g.abs().max()) for g in alone.values())
        for name, gradient in alone.items():
            off = float((together[name][i] - gradient).abs().max())
            # relative to the parameter's own gradient, unless that is but rounding of the others'
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            require(off <= CLOSE * scale, "`vmap(grad)` gives another gradient.", of=name, sample=i, error=off / scale)


def check_refused(run: Callable[[], None], why: str) -> None:
    """What class data say is refused ends in an error that says something."""
    try:
        run()
    except REFUSALS as refusal:
        require(str(refusal), "Refused without a word.")
    else:
        require(False, "It works, but class data say that it is refused.", why=why)


def check_second_order(module: nn.Module, x: Tensor) -> None:
    """The gradient of a gradient is right, against differences of gradients."""
    module, x = module.double(), x.double()
    direction = tokens(*x.shape, seed=8).double()

    def gradient(at: Tensor, graph: bool = False) -> Tensor:
        at = at.detach().requires_grad_()
        (grad,) = torch.autograd.grad(module(at).square().sum(), at, create_graph=graph)
        return (at, grad) if graph else grad  # type: ignore[return-value]

    at, grad = gradient(x, True)
    (second,) = torch.autograd.grad((grad * direction).sum(), at)
    # A long step where scans and FFTs compute in float32 whatever comes in: rounding over it is then 1e-5, its square
    # 1e-4. A short one where the kinks of ReLU and the like lie close.
    off = {}
    for step in (1e-2, 1e-5):
        expected = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
        off[step] = error(second, expected)
    require(min(off.values()) <= 1e-2, "The second derivative is wrong, and nobody says so.", by_step=off)


@promise(KIND)
def hooks_fire(name: str) -> None:
    """A hook on every leaf module fires in forward and in backward."""
    mixer, x = _case(name)
    check_hooks(mixer, x.requires_grad_(), untrained=trained_alone(name))


@promise(KIND)
def adapters_train(name: str) -> None:
    """A low-rank addition to any linear layer changes the output and trains."""
    mixer, x = _case(name)
    check_adapters(mixer, x, untrained=trained_alone(name))


@promise(KIND)
def parametrisations_are_honoured(name: str) -> None:
    """A parametrisation of any linear layer's weight changes the output."""
    mixer, x = _case(name)
    check_parametrize(mixer, x, untrained=trained_alone(name))


@promise(KIND)
def copies_are_equal(name: str) -> None:
    """`copy.deepcopy` and `pickle` give mixers with the same output."""
    check_copies(*_case(name))


@promise(KIND)
def linear_layers_can_be_quantised(name: str) -> None:
    """`quantize_dynamic` of the linear layers runs and stays near."""
    check_quantised(*_case(name))


@promise(KIND)
def functional_calls_use_the_weights_given(name: str) -> None:
    """`torch.func.functional_call` with other weights gives what a mixer with these weights gives."""
    check_functional_call(*_case(name))


@promise(KIND, about="__init__")
def it_can_be_built_without_memory(name: str) -> None:
    """Meta device, `to_empty` and `reset_parameters` give every parameter and buffer a value."""
    grid = small_grid(name)
    check_meta(build(name, grid), lambda: build(name, grid))


@promise(KIND)
def double_precision_works(name: str) -> None:
    """After `.double()` the output is float64 and near that of float32."""
    mixer, x = _case(name)
    with torch.no_grad():
        expected = mixer(x)
        y = mixer.double()(x.double())
    require(y.dtype == torch.float64, "The output is not float64.", got=y.dtype)
    near(y.float(), expected, "float64 and float32 differ.", tolerance=1e-3)


def _right_or_refused(name: str, what: str, check: Callable[[nn.Module, Tensor], None]) -> None:
    why = mixer_class(name).refuses.get(what)
    if why is not None:
        check_refused(lambda: check(*_case(name)), why)
        return
    try:
        check(*_case(name))
    except REFUSALS as refusal:
        require(False, f"`refuses` does not say that it has no {what}.", error=f"{type(refusal).__name__}: {refusal}")


@promise(KIND)
def second_derivatives_are_right_or_refused(name: str) -> None:
    """The gradient of a gradient is right, or class data say why it is refused, and it is."""
    _right_or_refused(name, "second derivatives", check_second_order)


@promise(KIND)
def per_sample_gradients_are_right_or_refused(name: str) -> None:
    """`torch.func.vmap(grad)` over a batch is right, or class data say why it is refused, and it is."""
    _right_or_refused(name, "vmap", check_per_sample_gradients)

"""Functions of PyTorch calls that keep nothing but their inputs for the gradient: the backward pass runs them again."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dispatch import wants_plain
from .registration import empties, register_op


def recomputed(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any] | str,
    *,
    outputs: str,
    wrt: str,
    compiled_only: bool = False,
) -> Callable[..., Any]:
    """`function`, recomputed in the backward pass; in what `torch.compile` makes it is one operator of the graph.

    So a loop in it, over chunks say, is not unrolled: one graph serves sequences of all lengths, and what is not kept
    without the compiler is not kept with it.

    Args:
        name: of the operator, unique.
        function: takes annotated tensors and numbers, returns a tensor or a tuple of tensors; out of place.
        fake, outputs, wrt: as in `register_op`.
        compiled_only: whether autograd keeps what it wants where nothing is compiled.
    """

    def forward(*args: Any) -> Any:
        made = function(*args)
        return tuple(y.contiguous() for y in made) if isinstance(made, tuple) else made.contiguous()

    def backward(*args: Any) -> tuple[Tensor, ...]:
        values = dict(zip(parameters, args, strict=False))
        grads = args[len(parameters) :]
        with _autograd_inside():
            leaves = {n: values[n].detach().requires_grad_() for n in names if values[n] is not None}
            made = function(*(values | leaves).values())
            made = made if isinstance(made, tuple) else (made,)
            pairs = [(y, g) for y, g in zip(made, grads, strict=True) if g is not None and y.requires_grad]
            found = torch.autograd.grad(
                [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs],
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        found = dict(zip(leaves, (g.contiguous() for g in found), strict=True))
        absent = empties(*(values[n] for n in names))
        return tuple(found.get(n, empty) for n, empty in zip(names, absent, strict=True))

    parameters, names = inspect.signature(function, eval_str=True).parameters, wrt.split()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    gradients = [inspect.Parameter(f"d{y}", kind, annotation=Tensor | None) for y in outputs.split()]
    given = list(parameters.values())
    several = tuple[(Tensor,) * len(names)]
    forward.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    backward.__signature__ = inspect.Signature([*given, *gradients], return_annotation=several)  # type: ignore[attr-defined]
    operator = register_op(
        name, forward, fake, outputs=outputs, wrt=wrt, plain=function,
        gradient=register_op(f"{name}_backward", backward, wrt),
    )  # fmt: skip

    def run(*args: Any) -> Any:
        if wants_plain():  # transforms, tracing and the exporter know neither
            return function(*args)
        if torch.compiler.is_compiling():
            return operator(*args)
        if compiled_only or not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


@contextlib.contextmanager
def _autograd_inside() -> Iterator[None]:
    """Autograd within an operator, where the dispatcher has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS", "AutogradOther"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield

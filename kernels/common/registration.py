"""How an op of `kernels/` is made known to PyTorch, and the conventions that all ops share.

*Files.* `kernels/<op>/` holds `__init__.py` (public functions, each with its `Op` of `dispatch.py`), `reference.py`,
`eager.py` and `triton.py` with the functions `<name>_reference` and so on, and `cases.py`.

*Registration.* Opaque loops (eager paths) and Triton launches become `torch.library` custom operators through
`register_op`: `torch.compile(fullgraph=True)` then has no graph break and `torch.library.opcheck` passes. What it looks
like and what is saved for the gradient follow from names of arguments. Custom operators and not `triton_op`: the latter
refuses interpreted kernels, so that it could not be tested without a GPU. Rules that opcheck enforces: type annotations
on every argument (`Tensor`, `Tensor | None`, `int`, `float`, `bool`, `str`), no output may be an input or a view of
one, no input is written to, and an output that is not wanted is an empty tensor rather than None. The host code looks
at shapes, never at values, since the compile-only driver of `tools.build` launches nothing.

*Kernels.* Decorate with `@triton.autotune(configs=configs(...), key=[...])`, `configs` from `autotune.py`: the first
config is the default one (no spills, tested), and the only one in the interpreter. Or, without autotune, pass constants
from the host. Accumulate in float32, `tl.cast` for scalars, int64 offsets, no float atomics.

*Cases.* `kernels/<op>/cases.py` holds `CASES`, a `Case` (`selftest/case.py`) for each public function: how it is called
at small, odd and model sizes, and what that must cost. The self-test runs it, `tools.build` compiles, `tools.traffic`
counts what it launches, `benchmarks.kernels` times it, and the roofline in `docs/kernels.md` is made of it.

*Tests.* See `tests/kernels/utils.py`. Triton runs in its interpreter there (`tests/conftest.py`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dispatch import is_exporting, wants_plain

_namespace = "mixerzoo"

# Full name of an operator, `mixerzoo::NAME` -> what it was registered with: counting FLOPs looks into it.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def library_namespace(name: str) -> Iterator[None]:
    """Register into another namespace meanwhile. Lets tests import a mutated copy of a kernel module."""
    global _namespace
    before, _namespace = _namespace, name
    try:
        yield
    finally:
        _namespace = before


def empties(*like: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous memory like each tensor; without elements, in float32, for one that is not there."""
    device = next(x.device for x in like if x is not None)
    return tuple(
        torch.empty(0, dtype=torch.float32, device=device)
        if x is None
        else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in like
    )


def register_op(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any] | str,
    *,
    outputs: str = "y",
    gradient: Callable[..., Any] | None = None,
    wrt: str = "",
    plain: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Make `implementation` the custom operator `mixerzoo::<name>`.

    Args:
        name: unique name, e.g. `"selective_scan_triton"`.
        implementation: takes annotated tensors and numbers, returns a tensor or a tuple of tensors.
        fake: names of arguments: there is one output like each of them (see `empties`). Or a function of the same
            arguments that returns empty tensors of the right shape, dtype and strides.
        outputs: names of the outputs.
        gradient: another registered operator (or a function) that returns the gradients `wrt`. The names of its
            arguments say what it is given, and so what is saved: arguments and outputs of this operator by their names,
            and the gradient of the output `y` as `dy`. Outputs whose gradient it does not take have none; a gradient
            that nobody computed comes as None where its annotation allows that, else as zeros.
        wrt: names of the arguments that have a gradient, in the order in which `gradient` returns them.
        plain: the same in PyTorch's own differentiable calls, out of place. It runs where others must look into the
            operator (`wants_plain`), and for gradients of gradients.
        flops: `flops(*shapes, out_shape=..., **kwargs) -> int`, matmul flops for `torch.utils.flop_counter`, which
            cannot look into the operator; shapes stand in the place of tensors.

    Returns:
        a function like `implementation`. Its attribute `op` is the operator.
    """
    full = f"{_namespace}::{name}"
    schema = torch.library.infer_schema(implementation, mutates_args=())
    op = torch.library.custom_op(full, _on_device(implementation), mutates_args=(), schema=schema)
    parameters = list(inspect.signature(implementation).parameters)
    op.register_fake(_fake_like(parameters, fake.split()) if isinstance(fake, str) else fake)
    IMPLEMENTATIONS[full] = implementation
    if gradient is not None:
        formula = _Gradient(parameters, outputs.split(), gradient, wrt.split(), plain)
        op.register_autograd(formula.backward, setup_context=formula.save)
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(op._opoverload.overloadpacket)(flops)

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        if wants_plain():
            if plain is not None:
                return plain(*args)
            if not is_exporting() and not torch.jit.is_tracing():
                raise NotImplementedError(
                    f"{full} has no forward-mode derivative and no rule for torch.func; call its op with "
                    'backend="reference".'
                )
        return op(*args)

    operator: Any = run
    operator.op = op
    return operator


def _on_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """With the device of the first tensor as the current one, on which Triton launches."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        first = next((x for x in args if isinstance(x, Tensor)), None)
        if first is None or not first.is_cuda:
            return implementation(*args)
        with torch.cuda.device_of(first):
            return implementation(*args)

    return run


def _fake_like(parameters: Sequence[str], names: Sequence[str]) -> Callable[..., Any]:
    places = [parameters.index(name) for name in names]

    def fake(*args: Any) -> Any:
        made = empties(*(args[i] for i in places))
        return made if len(places) > 1 else next(iter(made))

    return fake


class _Gradient:
    """What an operator saves, and its gradient, from the names of the arguments of `gradient` (`register_op`)."""

    def __init__(
        self,
        parameters: Sequence[str],
        outputs: Sequence[str],
        gradient: Callable[..., Any],
        wrt: Sequence[str],
        plain: Callable[..., Any] | None,
    ) -> None:
        self.parameters, self.outputs, self.gradient, self.wrt, self.plain = parameters, outputs, gradient, wrt, plain
        taken = inspect.signature(gradient).parameters
        self.taken = {name: "None" in str(p.annotation) for name, p in taken.items()}
        known = {*parameters, *outputs, *(f"d{y}" for y in outputs)}
        unknown = [*(set(self.taken) - known), *(set(wrt) - set(parameters))]
        assert not unknown, f"{unknown} are neither arguments nor outputs nor gradients of outputs"

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what `gradient` takes; of the other inputs what they look like."""
        made = output if isinstance(output, tuple) else (output,)
        values = dict(zip(self.parameters, inputs, strict=True)) | dict(zip(self.outputs, made, strict=True))
        names = [name for name in self.taken if name in values]
        if self.plain is not None and any(name in self.outputs for name in names):
            names += [
                name for name in self.wrt if name not in names
            ]  # of which outputs tell enough, but not to `plain`
        kept = {name: values[name] for name in names}
        ctx.names = [name for name, value in kept.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*(kept[name] for name in ctx.names))
        ctx.values = {name: v for name, v in values.items() if not isinstance(v, Tensor)}
        ctx.looks = {n: (v.shape, v.dtype, v.device) for n, v in values.items() if isinstance(v, Tensor)}
        ctx.mark_non_differentiable(
            *(y for name, y in zip(self.outputs, made, strict=True) if f"d{name}" not in self.taken)
        )
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """A gradient, or None, for every argument."""
        if all(g is None for g in grads):
            return (None,) * len(self.parameters)
        values = ctx.values | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if self.plain is not None and torch.is_grad_enabled():
            return self._again(ctx, values, grads)
        for name, g in zip(self.outputs, grads, strict=True):
            if g is None and not self.taken.get(f"d{name}", True):
                g = _zeros(*ctx.looks[name])
            values[f"d{name}"] = g
        found = self.gradient(*(values[name] for name in self.taken))
        found = dict(zip(self.wrt, found if isinstance(found, tuple) else (found,), strict=True))
        return tuple(found.get(name) if name in ctx.looks else None for name in self.parameters)

    def _again(self, ctx: Any, values: dict[str, Any], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradient as PyTorch calls, which has a gradient itself. Inputs that were not kept don't matter to it."""
        assert self.plain is not None
        needed = [name for i, name in enumerate(self.parameters) if ctx.needs_input_grad[i]]
        args = {name: values[name] if name in values else _zeros(*ctx.looks[name]) for name in self.parameters}
        # views of their own: an input may depend on another one, and these are partial derivatives
        args |= {
            n: v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for n, v in args.items() if n in needed
        }
        made = self.plain(*args.values())
        made = made if isinstance(made, tuple) else (made,)
        pairs = [(y, g) for y, g in zip(made, grads, strict=False) if g is not None and y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [args[n] for n in needed],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        found = dict(zip(needed, found, strict=True))
        return tuple(found.get(name) for name in self.parameters)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


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

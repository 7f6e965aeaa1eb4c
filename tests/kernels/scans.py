"""What the tests of `ssd`, `gla` and `delta_rule` share.

B batch, L length, G groups, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from mixerzoo.tests.kernels.utils import skewed
from mixerzoo.tests.utils import relative_error
from torch import Tensor


def scan_inputs(
    op: str,
    batch: int,
    length: int,
    heads: int,
    keys: int,
    size: int,
    *,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    decay: float = 1.0,
    initial: bool = True,
    documents: bool = False,
    gates: bool = True,
    strided: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs; `decay` is the largest of a step, `gates=False` leaves optional gates out.

    Documents change after 3 tokens and every 17 from then on, so that some chunks hold several and some boundaries lie
    near those of chunks.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    rows = heads if groups is None else groups
    inputs = {"q": normal(batch, length, rows, keys), "k": normal(batch, length, rows, keys)}
    inputs["v"] = normal(batch, length, heads, size)
    if op == "delta_rule":
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = uniform(batch, length, heads)
    if op == "ssd" and gates:
        inputs["beta"] = uniform(batch, length, heads)
    if op == "gla":
        inputs["g"] = -decay * uniform(batch, length, heads, keys)
    elif gates:
        inputs["g"] = -decay * uniform(batch, length, heads)
    if initial:
        inputs["initial_state"] = normal(batch, heads, keys, size)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if strided:
        inputs = {name: skewed(x) for name, x in inputs.items()}
    if documents:
        inputs["document_ids"] = ((torch.arange(length) + 14) // 17 % 3).expand(batch, length)
    return inputs


RESETS = {"strong": -1e4, "infinite": -torch.inf, "spread": -960.0}


def with_resets(inputs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The inputs with one in eight decays nearly or wholly 0; "spread": anywhere down to exp(-960)."""
    generator = torch.Generator().manual_seed(1)
    where, factor = (torch.rand(inputs["g"].shape, generator=generator) for _ in range(2))
    strong = RESETS[kind] * factor if kind == "spread" else torch.full_like(factor, RESETS[kind])
    return inputs | {"g": torch.where(where < 0.125, strong, inputs["g"])}


def check_golden_scan(
    run, inputs: dict[str, Tensor], golden, outputs: dict[str, str], cotangents: dict[str, str], names: dict[str, str]
) -> None:
    """Compare outputs and gradients with a golden fixture.

    Args:
        run: `run(**inputs) -> dict of outputs`.
        inputs: leaves by the fixture's argument name.
        golden: the fixture.
        outputs: our output's name -> key of the fixture.
        cotangents: our output's name -> key of its cotangent.
        names: argument name -> key of its gradient.
    """
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    ours = run(**leaves)
    for name, key in outputs.items():
        assert relative_error(ours[name], golden[key]) < 1e-5, name
    sum((ours[name] * golden[key]).sum() for name, key in cotangents.items()).backward()
    for name, key in names.items():
        assert relative_error(leaves[name].grad, golden[key]) < 2e-5, f"gradient of {name}"

"""What the contract promises, for every registered mixer. The checks are those of `contract/`."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract import Promise, parts, promises
from mixerzoo.contract.mixers import DIM, build, last_grid
from mixerzoo.contract.tools import tokens
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer

NAMES = parts("mixer")
CASES = [pytest.param(p, name, id=f"{p.name}-{name}") for p in promises("mixer") for name in NAMES if p.applies(name)]


@pytest.mark.parametrize(("promise", "name"), CASES)
def test_promise(promise: Promise, name: str) -> None:
    promise.check(name)


@pytest.mark.parametrize("name", ["attention", "deconstructed"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_before_packed_documents(name: str, causal: bool) -> None:
    """The mask hides the first token of a document from the rest of it."""
    mixer = create_mixer(name, 32, causal=causal)
    x, ids = tokens(1, 8, 32), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 0] = False
    y = mixer(x, document_ids=ids, mask=mask)
    torch.testing.assert_close(y[:, 1:4], mixer(x[:, 1:4]))
    torch.testing.assert_close(y[:, 4:], mixer(x[:, 4:]))


def test_garbage_beside_the_padding() -> None:
    """What travels beside the tokens may be garbage at padding, too."""
    mixer = create_mixer("deconstructed", 32, causal=True, variant="static_embedding")
    x, embeddings = tokens(1, 6, 32), tokens(1, 6, 32, seed=2)
    mask = torch.tensor([[False, True, True, False, True, True]])
    expected = mixer(x[mask][None], embeddings=embeddings[mask][None])
    embeddings[~mask] = float("nan")
    torch.testing.assert_close(mixer(x, mask=mask, embeddings=embeddings)[mask][None], expected)


def test_documents_in_the_causal_form_only() -> None:
    with pytest.raises(ConfigError, match="causal form only"):
        create_mixer("conv", 32, grid=(8,))(tokens(1, 8, 32), document_ids=torch.zeros(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_inductor(name: str) -> None:
    grid = last_grid(name)
    mixer, x = build(name, grid), tokens(2, *grid, DIM)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True)(x), mixer(x), rtol=1e-3, atol=1e-4)

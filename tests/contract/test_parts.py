"""What the contract promises, for every registered part but token mixers, which have a file of their own."""

from __future__ import annotations

import pytest
from mixerzoo.contract import Promise, kinds, parts, promises

CASES = [
    pytest.param(promise, name, id=f"{kind}-{name}-{promise.name}")
    for kind in kinds()
    if kind != "mixer"
    for name in parts(kind)
    for promise in promises(kind, name)
]


@pytest.mark.parametrize(("promise", "name"), CASES)
def test_promise(promise: Promise, name: str) -> None:
    promise.check(name)


def test_every_promise_says_what_it_is() -> None:
    assert all(promise.statement.endswith(".") for kind in kinds() for promise in promises(kind))

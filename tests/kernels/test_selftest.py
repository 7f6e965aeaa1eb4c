"""The self-test: it passes on what is right, names what was broken on purpose, and `auto` then avoids it."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from mixerzoo import kernels
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import choose_backend
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.selftest import check as checks
from mixerzoo.kernels.selftest import verdicts
from mixerzoo.kernels.selftest.__main__ import failures, main
from mixerzoo.kernels.selftest.check import Check, Outcome, checks_of, perform
from mixerzoo.kernels.selftest.compiling import pinned
from mixerzoo.tests.kernels.utils import KERNELS, mutated
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Outcomes of these tests are nobody else's."""
    monkeypatch.setenv("MIXERZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(verdicts.AVOID, raising=False)
    verdicts.forget()
    yield
    verdicts.forget()


def chosen_on_a_gpu(op: str) -> str:
    """What `auto` takes for a tensor on a GPU, which need not be there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return choose_backend(op, "auto", torch.empty(3, device="cuda"))


def test_every_public_op_has_a_case():
    """Each function of `mixerzoo.kernels` with kernels behind it is tested and timed."""
    functions = set()
    for name in kernels.__all__:
        function = getattr(kernels, name)
        folder = KERNELS / getattr(function, "__module__", "").rpartition(".")[2]
        if "backend" in getattr(function, "__annotations__", {}) and (folder / "triton.py").exists():
            functions.add(name)
    assert len(functions) >= 17
    assert functions == set(find_ops())


@pytest.mark.parametrize("op", find_ops())
def test_right_kernels_pass(op):
    case = find_ops([op])[op]
    check = checks_of(case, quick=True)[-1]  # strided; sizes and dtypes are the subject of the ops' own tests
    outcome = perform(case, check, "cpu")
    assert outcome.passed, outcome
    assert outcome.skipped is None


@pytest.mark.slow
@pytest.mark.parametrize("op", find_ops())
def test_all_checks(op):
    case = find_ops([op])[op]
    assert [o for o in (perform(case, check, "cpu") for check in checks_of(case)) if not o.passed] == []


def test_a_broken_kernel_is_named_and_avoided(tmp_path, capsys):
    with mutated("segment_pool", "dlocal += tl.where", "dlocal = tl.where", tmp_path):
        assert main(["--quick", "--op", "segment_pool", "shift", "--json", str(tmp_path / "all.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert "FAILED segment_pool float32 (odd sizes 0): gradient of local" in printed
    assert f"{verdicts.AVOID}=segment_pool" in printed
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert {r["op"] for r in rows if not r["passed"]} == {"segment_pool"}
    assert {r["op"] for r in rows if r["passed"]} >= {"shift"}
    with pytest.warns(RuntimeWarning, match="segment_pool: its Triton kernels failed the self-test on this card"):
        assert chosen_on_a_gpu("segment_pool") == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen_on_a_gpu("segment_pool") == "eager"  # said once
        assert chosen_on_a_gpu("shift") == "triton"
    # mended: the new outcome takes the place of the old one
    assert main(["--quick", "--op", "segment_pool"]) == 0
    assert chosen_on_a_gpu("segment_pool") == "triton"


def test_a_card_that_was_never_tested(caplog):
    with caplog.at_level(logging.INFO, logger="mixerzoo.kernels"):
        assert chosen_on_a_gpu("ssd") == "triton"
        assert chosen_on_a_gpu("gla") == "triton"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "python -m mixerzoo.kernels.selftest" in record.message


def test_ops_are_avoided_by_name(monkeypatch):
    monkeypatch.setenv(verdicts.AVOID, "ssd, gla_step")
    assert chosen_on_a_gpu("ssd") == "eager"
    assert chosen_on_a_gpu("gla_step") == "eager"
    assert chosen_on_a_gpu("gla") == "triton"
    monkeypatch.setenv(verdicts.AVOID, "sdd")
    with pytest.raises(ConfigError, match='Did you mean "ssd"'):
        chosen_on_a_gpu("ssd")


def test_what_counts_as_a_failure():
    assert Outcome("op", "odd", 0, "float32", error=1e-5, limit=1e-4).passed
    assert not Outcome("op", "odd", 0, "float32", error=2e-4, limit=1e-4).passed
    assert not Outcome("op", "odd", 0, "float32", limit=1e-4, problem="two runs differ").passed
    found = failures([Outcome("a", "odd", 0, "x"), Outcome("b", "odd", 0, "y", problem="no")])
    assert found == {"a": "", "b": "y: no"}


def test_what_raises_and_what_differs_between_runs_fails(monkeypatch):
    case = find_ops(["shift"])["shift"]
    check = checks_of(case)[0]
    runs = iter(range(100))

    def raising(**arguments):
        if arguments["backend"] == "triton":
            raise RuntimeError("out of resources")
        return case.run(**arguments)

    def moving(**arguments):
        y = case.run(**arguments)
        return y + 1e-7 * next(runs) if arguments["backend"] == "triton" else y

    for run, words in ((raising, "RuntimeError: out of resources"), (moving, "two runs differ in output 0")):
        outcome = perform(replace(case, run=run), check, "cpu")
        assert not outcome.passed
        assert words in str(outcome.problem)


@triton.autotune([triton.Config({"VALUE": v}) for v in (1, 2, 3)], key=[])
@triton.jit
def _valued_kernel(x_ptr, VALUE: tl.constexpr):
    tl.store(x_ptr, VALUE)


def test_every_configuration_is_taken():
    taken = []
    for index in range(3):
        x = torch.zeros(1)
        with pinned(index) as lengths:
            _valued_kernel[1,](x)
        assert lengths == {"_valued_kernel": 3}
        taken.append(x.item())
    assert taken == [1, 2, 3]


def test_a_configuration_that_is_too_large_is_left_out(monkeypatch):
    """As tuning does; but where none fits, the op fails."""
    from triton.runtime.errors import OutOfResources

    case = find_ops(["shift"])["shift"]
    check = checks_of(case)[0]
    taken: list[int] = []

    def run(**arguments):
        if arguments["backend"] == "triton":
            x = torch.zeros(1)
            _valued_kernel[1,](x)
            taken.append(int(x))
            if x.item() in refused:
                raise OutOfResources(300_000, 232_448, "shared memory")
        return case.run(**arguments)

    refused = {1, 3}
    outcome = perform(replace(case, run=run), check, "cpu")
    assert outcome.passed, outcome
    assert set(taken) == {1, 2, 3}
    refused = {1, 2, 3}
    outcome = perform(replace(case, run=run), check, "cpu")
    assert not outcome.passed
    assert "shared memory" in str(outcome.problem)


@pytest.mark.parametrize("op", ["ssd", "causal_conv1d", "ssd_step"])
def test_large_sizes_in_small(op, monkeypatch):
    """The last row of a batch against the reference, a long sequence against the eager path."""
    case = find_ops([op])[op]
    small = {"M": {**case.odd[0], "B": 1}}
    case = replace(case, models=small)
    monkeypatch.setattr(checks, "HUGE", 20_000)
    monkeypatch.setattr(checks, "LONG", 70)
    kinds = [c for c in checks_of(case, large=True) if c.kind in ("huge", "long")]
    assert [c.kind for c in kinds] == (["huge", "long"] if "L" in small["M"] else ["huge"])
    for check in kinds:
        outcome = perform(case, check, "cpu")
        assert outcome.passed, outcome
        assert outcome.where


def test_a_last_row_that_is_wrong_is_noticed(monkeypatch):
    case = find_ops(["shift"])["shift"]
    case = replace(case, models={"M": case.odd[0]})
    monkeypatch.setattr(checks, "HUGE", 20_000)

    def wrong(**arguments):
        y = case.run(**arguments)
        return torch.cat([y[:-1], 0 * y[-1:]]) if arguments["backend"] == "triton" else y

    check = Check("shift", "huge", 0, torch.bfloat16)
    assert perform(case, check, "cpu").passed
    assert not perform(replace(case, run=wrong), check, "cpu").passed


def test_mistakes_are_explained(capsys):
    assert main(["--op", "sdd"]) == 2
    assert 'Did you mean "ssd"?' in capsys.readouterr().err

"""`benchmarks/kernels.py`, as far as it goes without a GPU: every subject and peer is called. No time is looked at."""

from __future__ import annotations

import json

import pytest
import torch
from mixerzoo.benchmarks.kernel_peers import PEERS
from mixerzoo.benchmarks.kernels import COMPILED, OURS, Job, dims_of, jobs_of, main, measure, milliseconds
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.selftest.case import Draw
from mixerzoo.kernels.selftest.comparison import error


def test_every_op_is_timed_and_every_peer_is_of_an_op():
    jobs = jobs_of([])
    cases = find_ops()
    assert {j.op for j in jobs if j.what == OURS} == set(cases)
    assert set(PEERS) <= set(cases)
    assert {(j.op, j.what) for j in jobs} >= {(op, peer) for op, peers in PEERS.items() for peer in peers}
    whats = [j.what for j in jobs]
    assert whats.index(COMPILED) > max(i for i, what in enumerate(whats) if what == OURS)  # ours come first


@pytest.mark.parametrize("op", find_ops())
def test_every_subject_runs_and_writes_its_rows(op, tmp_path):
    assert main(["--rehearse", "--only", op, "--json", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    rows = [r for r in rows if r["op"] == op]
    assert {(r["what"], r["backward"]) for r in rows} == {
        (j.what, j.backward) for j in jobs_of([op], rehearse=True) if j.op == op
    }
    for row in rows:
        if "ms" not in row:  # libraries that this machine need not have, and kernels of others that want a GPU
            assert not row["what"].startswith(("ours", "torch")), row


SAME = {("causal_conv1d", "torch conv1d"), ("pool_mix", "torch avg_pool2d"), ("token_mlp", "torch linear")}
SAME |= {("spectral_filter", "torch multiply"), ("block_sparse_attention", "FlexAttention")}


@pytest.mark.parametrize(("op", "peer"), sorted(SAME))
def test_peers_compute_the_same(op, peer):
    case = find_ops([op])[op]
    dims = dims_of(case, Job(op, "small", False, peer))
    inputs = case.inputs(Draw(dtype=torch.float32), **dims)
    with torch.no_grad():
        theirs = PEERS[op][peer](inputs)
    assert error(theirs, case.run(**inputs, backend="reference")) < 1e-5


def test_what_fails_is_a_row(monkeypatch):
    def broken(_):
        raise ZeroDivisionError("no\nmatter")

    monkeypatch.setitem(PEERS, "shift", {"broken": broken})
    row = measure(Job("shift", "small", False, "broken"), "cpu", rehearse=True)
    assert row["failed"] == "ZeroDivisionError: no"
    assert "ms" not in row


def test_runs_take_turns():
    seen: list[int] = []
    milliseconds([lambda: seen.append(0), lambda: seen.append(1)], "cpu", rounds=4)
    assert seen[-4:] == [0, 1, 0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "found no GPU" in capsys.readouterr().err


def test_mistakes_are_explained(capsys):
    assert main(["--only", "sdd"]) == 2
    assert 'Did you mean "ssd"?' in capsys.readouterr().err

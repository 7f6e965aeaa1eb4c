"""`tools.predict`: occupancy, loads of the assembly, and times, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.tools.predict import CLOCK, LAUNCH, Launch, asked_at_once, main, occupancy, predict, sample
from mixerzoo.tools.traffic import DOCUMENT


def test_occupancy():
    assert occupancy(registers=32, warps=4, shared=0) == 16  # 64 warps
    assert occupancy(registers=255, warps=4, shared=0) == 2  # 8192 registers a warp
    assert occupancy(registers=128, warps=8, shared=0) == 2
    assert occupancy(registers=33, warps=4, shared=0) == 12  # 33 registers are 40
    assert occupancy(registers=32, warps=1, shared=0) == 32  # programs
    assert occupancy(registers=32, warps=4, shared=100_000) == 2  # and 1 KB each


PTX = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
$L__BB0_1:
    ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd7 + 0 ], 0x10, %r8;
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
"""


def test_loads_are_read_off_the_assembly():
    assert asked_at_once(PTX) == (16, 36)
    assert asked_at_once(PTX.replace("$L__BB0_1:", "")) == (16, 54)
    assert asked_at_once("ret;") == (0, 0)


def test_programs_are_taken_from_each_third():
    assert sample(2) == [0, 1]
    assert sample(6) == [1, 3, 5]
    assert sample(600) == [100, 300, 500]


def test_times():
    launch = Launch("k", programs=132, warps=8, registers=32, shared=0, vector=16, asked=32, other=128e6)
    assert launch.seconds == (pytest.approx(1e6 / CLOCK + LAUNCH), "instructions")
    assert launch.under_way == 8 * 32 * 32
    twice = Launch("k", programs=133, warps=8, registers=32, other=128e6)  # one of them has two
    assert twice.seconds[0] == pytest.approx(2e6 / CLOCK + LAUNCH)
    lonely = Launch("k", programs=1, warps=2, registers=32, other=128e6)  # a quarter of the warps it takes
    assert lonely.seconds[0] == pytest.approx(4e6 / CLOCK + LAUNCH)
    for key, rate in (("read", 64 * CLOCK), ("exponentials", 16 * CLOCK), ("flops", 989e12 / 132)):
        busy = Launch("k", programs=132, warps=8, registers=32, **{key: 1e9})
        assert busy.seconds[0] == pytest.approx(1e9 / rate + LAUNCH)


def test_the_documentation_has_every_op():
    text = DOCUMENT.read_text().partition("<!-- prediction:begin -->")[2].partition("<!-- prediction:end -->")[0]
    for name, case in find_ops().items():
        rows = [line for line in text.splitlines() if line.startswith((f"| {name} forward |", f"| {name} |"))]
        assert len(rows) == 2 * len(case.models), name


@pytest.mark.slow
def test_both_processes_see_the_same_launches():
    found = predict(["shift"])
    (size,) = find_ops(["shift"])["shift"].models
    kernels = {key: [launch.kernel for launch in launches] for key, launches in found.items()}
    calls = [(batch, backward) for batch in (1, 8) for backward in (0, 1)]
    assert kernels == {f"shift|{size}|{b}|{backward}": ["_shift_kernel"] * (1 + backward) for b, backward in calls}
    # (1, 14, 14, 384) bf16, read and written once, but for what comes from outside
    (launch,) = found[f"shift|{size}|1|0"]
    assert launch.programs * launch.read == pytest.approx(2 * 2 * 14 * 14 * 384, rel=0.1)
    assert launch.vector == 16


def test_mistakes_are_explained(capsys):
    assert main(["--only", "shft"]) == 2
    assert 'Did you mean "shift"?' in capsys.readouterr().err

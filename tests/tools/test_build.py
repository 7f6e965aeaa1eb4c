"""`tools.build`: every kernel compiles for every architecture, and what is wrong with one is found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mixerzoo.kernels.common.discovery import find_cases
from mixerzoo.tools.build import (
    USUAL,
    Built,
    Records,
    Report,
    _multiplies_16_bit,
    build_elsewhere,
    count_in_loops,
    main,
)

pytest.importorskip("triton")

FINE = {
    "case": "op.forward",
    "kernel": "kernel",
    "default": True,
    "config": {"X": 64},
    "registers": 64,
    "spilled": 0,
    "shared": 1024,
    "matrix": ["mma"],
    "dots": True,
}


# of every op the case with most kernels; all cases for all four architectures take ten minutes
QUICK = {name.split(".")[0]: name for name in find_cases()} | {
    name.split(".")[0]: name for name in find_cases() if name.endswith(".backward")
}


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_default_config_of_every_op(arch):
    assert len(QUICK) >= 12
    report = build_elsewhere(arch, list(QUICK.values()), default_only=True)
    assert not report.problems() + report.worse(Records().of(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", USUAL)
@pytest.mark.parametrize("op", sorted({name.split(".")[0] for name in find_cases()}))
def test_default_configs(arch, op):
    assert not build_elsewhere(arch, [op], default_only=True).problems()


@pytest.mark.slow
@pytest.mark.parametrize("arch", USUAL)
def test_every_config(arch):
    assert not build_elsewhere(arch).problems()


BUILD = """
import sys
from mixerzoo.kernels.common.discovery import find_cases
from mixerzoo.tools.build import build

report = build(sys.argv[1], find_cases(sys.argv[2:]), default_only=True)
print(len(report.built), *report.failures, sep="\\n")
"""


def failures(arch: str, cases: list[str], tmp_path) -> list[str]:
    """Of a chip for which only compiling is asked."""
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, arch, *cases], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    built, *found = done.stdout.splitlines()
    assert int(built) >= len(cases)
    return found


def test_amd_compiles_without_tf32(tmp_path):
    """Only gfx942 knows it; asked for 16-bit numbers, too, it fails elsewhere."""
    assert not failures("gfx90a", ["token_mlp.backward"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx90a", "gfx950", "gfx1100"])
def test_amd_compiles_everything(arch, tmp_path):
    assert not failures(arch, list(find_cases()), tmp_path)


def test_what_counts_as_a_problem():
    assert not Report("sm_90", [Built(**FINE)]).problems()
    for change, words in [
        ({"spilled": 8}, "spills 8"),
        ({"spilled": None}, "unknown"),
        ({"shared": 300_000}, "shared memory"),
        ({"matrix": []}, "matrix instructions"),
    ]:
        (problem,) = Report("sm_90", [Built(**(FINE | change))]).problems()
        assert words in problem
    assert not Report("sm_90", [Built(**(FINE | {"spilled": 8, "default": False}))]).problems()
    assert not Report("sm_90", [Built(**(FINE | {"matrix": [], "dots": False}))]).problems()
    assert Report("sm_90").problems() == ["sm_90: no kernel was compiled"]
    assert Report("sm_90", [Built(**FINE)], ["op.backward: CompilationError"]).problems()


def test_a_kernel_that_needs_more_than_before_is_a_problem(tmp_path):
    records = Records(tmp_path / "records.json")
    before = Built(**FINE, shuffles=4, barriers=2)
    records.put(Report("sm_90", [before]))
    records.write()
    recorded = Records(tmp_path / "records.json").of("sm_90")
    assert recorded == {"op.forward kernel X=64": [64, 0, 4, 2]}
    assert Records(tmp_path / "records.json").of("sm_80") == {}
    assert not Report("sm_90", [before]).worse(recorded)
    for change, words in [
        ({"registers": 96}, "96 registers, 64 were recorded"),
        ({"spilled": 8}, "8 bytes spilled, 0 were"),
        ({"shuffles": 330}, "330 shuffles in a loop, 4 were"),
        ({"barriers": 3}, "3 barriers in a loop, 2 were"),
    ]:
        (problem,) = Report("sm_90", [Built(**(FINE | {"shuffles": 4, "barriers": 2} | change))]).worse(recorded)
        assert words in problem


def test_the_innermost_loop_is_counted():
    code = """
        /*0000*/                   SHFL.BFLY PT, R0, R1, 0x1, 0x1f ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0030*/               @P0 SHFL.IDX PT, R0, R1, 0x1, 0x1f ;
        /*0040*/                   SHFL.BFLY PT, R0, R1, 0x1, 0x1f ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_3) ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   EXIT ;
"""
    assert {k: v for k, v in count_in_loops(code).items() if k in ("SHFL", "BAR")} == {"SHFL": 2, "BAR": 1}
    assert count_in_loops("        /*0000*/    EXIT ;") == {}


def test_products_of_16_bit_matrices_are_recognised():
    dot = "%d = tt.dot %a, %b, %c : tensor<16x16x{0}> * tensor<16x16x{0}> -> tensor<16x16xf32>"
    assert _multiplies_16_bit(dot.format("bf16"))
    assert _multiplies_16_bit(dot.format("f16"))
    assert not _multiplies_16_bit(dot.format("f32"))
    assert not _multiplies_16_bit("%d = tt.load %a : tensor<16x16xbf16> * tensor<16x16xbf16>")


BROKEN = """
import sys
import torch, triton, triton.language as tl
from mixerzoo.kernels.common.autotune import configs
from mixerzoo.tools.build import build

@triton.jit
def good(x_ptr):
    tl.store(x_ptr + tl.arange(0, 16), 1.0)

@triton.jit
def bad(x_ptr):
    tl.store(x_ptr + tl.arange(0, 15), 1.0)

@triton.autotune(configs=configs(({"W": 8192}, 1, 1), ({"W": 64}, 1, 1)), key=[])
@triton.jit
def spilling(x_ptr, W: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, W))
    tl.store(x_ptr + tl.arange(0, W), x - tl.sum(x))  # 256 numbers for each of 32 threads are alive at once

x = torch.zeros(1 << 14)
report = build("sm_90", {
    "op.good": lambda: good[1,](x), "op.bad": lambda: bad[1,](x), "op.spilling": lambda: spilling[1,](x),
})
print(report.table())
print(*report.problems(), sep="\\n")
"""


def test_broken_kernels_are_found(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_90: ")]
    assert len(lines) == 2, done.stdout
    assert lines[0].startswith("sm_90: op.bad: CompilationError")
    assert lines[1].startswith("sm_90: op.spilling: spilling {'W': 8192")
    assert "3 kernels built" in done.stdout


def test_mistakes_are_explained(capsys):
    assert main(["--arch", "sm_9"]) == 2
    assert 'Did you mean "sm_90"?' in capsys.readouterr().err
    assert main(["--only", "selective_scann"]) == 2
    assert 'Did you mean "selective_scan"?' in capsys.readouterr().err

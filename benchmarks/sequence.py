"""Our sequence mixers: beside transformers, decoding per token, and growth of time and memory with the length.

    python -m mixerzoo.benchmarks.sequence [--parts peers decode scaling memory] [--mixers NAME ...] [--rounds 7]
        [--threads N] [--cpu-time]

peers: Mamba-1 and Mamba-2 blocks beside transformers' PyTorch path, same weights, outputs compared first; interleaved.
    A ratio is transformers' time over ours, the median over rounds with its quartiles; above 1 ours is faster.
decode: time of one `step` after 100 and after 4,000 tokens, interleaved, and the size of the state.
scaling: forward and backward of every causal mixer against the length, and what a step keeps for backward, with the
    exponents of least-squares lines through the logarithms.
memory: peak resident memory of a training step of the SSMs in a fresh process for each, against length and d_state.

--cpu-time: on one thread, count the time that this process computes, for a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mixerzoo.benchmarks.interleaved import interleave, ratio
from mixerzoo.mixers import Mixer, create_mixer, list_mixers, mixer_class, mixer_options
from mixerzoo.mixers.state import state_bytes
from mixerzoo.training.cost import measure_activation_bytes, peak_memory_bytes
from torch import Tensor, nn

PARTS = ("peers", "decode", "scaling", "memory")
Clock = Callable[[], float]
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def forward_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """An inference run."""

    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run


def step_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, to the input and the parameters."""
    leaf = x.clone().requires_grad_()

    def run() -> object:
        module.zero_grad()
        leaf.grad = None
        module(leaf).square().mean().backward()
        return leaf.grad

    return run


def peers(rounds: int, clock: Clock, only: list[str] | None = None) -> list[dict[str, Any]]:
    """The blocks of mamba-130m and mamba2-130m beside transformers."""
    from mixerzoo.models.interop.registration import keep_kernels_apart

    keep_kernels_apart()
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    mamba = MambaMixer(MambaConfig(hidden_size=768), layer_idx=0)
    mamba2 = Mamba2Mixer(
        Mamba2Config(hidden_size=768, num_heads=24, head_dim=64, n_groups=1, state_size=128), layer_idx=0
    )
    cases = [
        ("mamba", mamba, create_mixer("mamba", 768), "forward", 2048),
        ("mamba", mamba, create_mixer("mamba", 768), "forward+backward", 512),
        ("mamba2", mamba2, create_mixer("mamba2", 768, head_dim=64), "forward", 2048),
        ("mamba2", mamba2, create_mixer("mamba2", 768, head_dim=64), "forward+backward", 2048),
    ]
    rows = []
    for name, theirs, ours, what, length in cases:
        if only and name not in only:
            continue
        ours.load_state_dict(ours.convert_official(theirs.state_dict()))
        x = torch.randn(1, length, 768)
        with torch.inference_mode():
            difference = float((ours(x) - theirs(x)).abs().max())
        make = forward_of if what == "forward" else step_of
        seconds = interleave({"theirs": make(theirs, x), "ours": make(ours, x)}, rounds=rounds, warmup=1, clock=clock)
        row = {
            "part": "peers",
            "mixer": name,
            "what": what,
            "length": length,
            "difference": difference,
            "theirs_s": min(seconds["theirs"]),
            "ours_s": min(seconds["ours"]),
            **ratio(seconds["theirs"], seconds["ours"]),
        }
        rows.append(row)
        print(
            f"{name:7} {what:17} L={length:<5} theirs {row['theirs_s']:8.3f} s  ours {row['ours_s']:7.3f} s  "
            f"ratio {row['ratio']:.1f} ({row['low']:.1f} .. {row['high']:.1f})  max difference {difference:.1e}"
        )
    return rows


def decode(rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """One step after 100 and after 4,000 tokens."""
    rows = []
    for name in ("mamba", "mamba2", "linear_attention", "delta", "attention"):
        mixer = create_mixer(name, 768, causal=True).eval()
        states = {}
        with torch.no_grad():
            for length in (100, 4000):
                _, states[length] = mixer.prefill(torch.randn(1, length, 768))
        x = torch.randn(1, 768)

        def step_after(length: int, mixer: Mixer = mixer, states: dict = states, x: Tensor = x) -> Callable[[], object]:
            def run() -> object:
                with torch.no_grad():
                    return mixer.step(x, states[length])

            return run

        runs = {str(length): step_after(length) for length in states}
        seconds = interleave(runs, rounds=3 * rounds, min_seconds=0.02, clock=clock)
        size = {length: state_bytes(state) for length, state in states.items()}
        row = {
            "part": "decode",
            "mixer": name,
            "after_100_us": 1e6 * min(seconds["100"]),
            "after_4000_us": 1e6 * min(seconds["4000"]),
            "growth": ratio(seconds["4000"], seconds["100"])["ratio"],
            "state_bytes_100": size[100],
            "state_bytes_4000": size[4000],
        }
        rows.append(row)
        print(
            f"{name:17} step after 100 tokens {row['after_100_us']:7.0f} us, "
            f"after 4,000 {row['after_4000_us']:7.0f} us, ratio {row['growth']:.2f}; "
            f"state {size[100]:,} and {size[4000]:,} bytes"
        )
    return rows


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(v) for v in lengths], [math.log(max(v, 1e-12)) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def scaling(
    rounds: int, longest: int, clock: Clock, only: list[str] | None = None, dim: int = 64
) -> list[dict[str, Any]]:
    """Time and kept memory of a training step against the length."""
    rows = []
    for name in list_mixers(causal=True, axes=1):
        cls = mixer_class(name)
        if cls.needs_grid or (only and name not in only):
            continue  # parameters N x N: a length of their own
        quadratic = cls.complexity not in ("N", "N log N", "1")
        lengths = [n for n in LENGTHS if n <= longest and not (quadratic and n > 8192)]
        # lengths are timed by turns, so that a slow moment of the machine does not fall on one of them alone
        runs, kept = {}, []
        for length in lengths:
            options = {"l_max": length} if "l_max" in mixer_options(name) else {}
            mixer = create_mixer(name, dim, causal=True, **options)
            x = torch.randn(1, length, dim)
            runs[str(length)] = step_of(mixer, x)
            kept.append(float(measure_activation_bytes(mixer, x)))
        seconds = interleave(runs, rounds=max(3, rounds // 2), warmup=1, clock=clock)
        best = [min(seconds[str(n)]) for n in lengths]
        row = {
            "part": "scaling",
            "mixer": name,
            "complexity": cls.complexity,
            "lengths": lengths,
            "seconds": best,
            "kept_bytes": kept,
            "time_exponent": exponent(lengths, best),
            "memory_exponent": exponent(lengths, kept) if min(kept) > 0 else 0.0,
        }
        rows.append(row)
        print(
            f"{name:17} {cls.complexity:8} time N^{row['time_exponent']:.2f} ({best[0] * 1e3:.1f} ms at {lengths[0]}, "
            f"{best[-1] * 1e3:.0f} ms at {lengths[-1]}); kept N^{row['memory_exponent']:.2f} "
            f"({kept[-1] / lengths[-1] / dim / 4:.1f} floats per token and channel)"
        )
    return rows


def peak_of_step(name: str, length: int, d_state: int, dim: int = 256) -> int:
    """Bytes by which a training step raises the peak of this process. Run in a fresh process."""
    mixer = create_mixer(name, dim, d_state=d_state)
    step_of(mixer, torch.randn(1, 64, dim))()  # threads and libraries
    run = step_of(mixer, torch.randn(1, length, dim))
    before = peak_memory_bytes()
    run()
    return peak_memory_bytes() - before


def memory(threads: int) -> list[dict[str, Any]]:
    """Peak of a training step, against length and d_state."""
    rows = []
    for name in ("mamba", "mamba2"):
        for d_state in (16, 64):
            for length in (2048, 8192):
                command = [sys.executable, "-m", "mixerzoo.benchmarks.sequence"]
                command += ["--peak", name, str(length), str(d_state), "--threads", str(threads)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peak = int(output.strip().splitlines()[-1])
                rows.append({"part": "memory", "mixer": name, "d_state": d_state, "length": length, "peak": peak})
                floats = peak / 4 / length / 512
                print(
                    f"{name:7} d_state={d_state:<3} L={length:<5} peak of a step {peak / 2**20:7.1f} MiB, "
                    f"{floats:.1f} floats per token and inner channel"
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mixers", nargs="+", help="only these, in the parts peers and scaling")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest sequence of the part scaling")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=3, metavar=("MIXER", "LENGTH", "D_STATE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1: the times of several threads add up")
    if args.peak:
        print(peak_of_step(args.peak[0], int(args.peak[1]), int(args.peak[2])))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.machine()}")
    start = time.time()
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        if part == "peers":
            rows += peers(args.rounds, clock, args.mixers)
        elif part == "decode":
            rows += decode(args.rounds, clock)
        elif part == "scaling":
            rows += scaling(args.rounds, args.longest, clock, args.mixers)
        else:
            rows += memory(args.threads)
    print(f"{time.time() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

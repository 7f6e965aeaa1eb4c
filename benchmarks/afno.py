"""AFNO beside its straightforward formulation: time and memory, forward and with backward. One process, interleaved.

    python -m mixerzoo.benchmarks.afno [--grid 64 64] [--dim 768] [--batch 1] [--rounds 11] [--json FILE]

The baseline is what the formulas say if real and imaginary parts are kept apart: `rfft2`, four zero-filled buffers into
which eight block products are written for the kept frequencies, `stack`, `softshrink`, `irfft2`. A ratio is its time
over ours, the median over rounds with its quartiles; above 1 ours is faster. Memory is what a forward pass keeps for
backward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mixerzoo.benchmarks.interleaved import interleave, ratio
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.spectral.fourier import AFNO
from mixerzoo.training.cost import measure_activation_bytes
from torch import Tensor


def straightforward(mixer: AFNO, x: Tensor) -> Tensor:
    """What `mixer` computes on `(B, H, W, C)`, all frequencies kept, in the most direct way."""
    batch, height, width, dim = x.shape
    w1, b1, w2, b2 = mixer.w1, mixer.b1, mixer.w2, mixer.b2
    z = torch.fft.rfft2(x.float(), dim=(1, 2), norm="ortho")
    modes = z.shape[2]
    z = z.reshape(batch, height, modes, w1.shape[1], w1.shape[2])
    hidden = (batch, height, modes, w1.shape[1], w1.shape[3])
    real1, imag1 = torch.zeros(hidden, device=x.device), torch.zeros(hidden, device=x.device)
    real2, imag2 = torch.zeros(z.shape, device=x.device), torch.zeros(z.shape, device=x.device)
    kept = slice(0, modes)

    def product(v: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("...ki,kio->...ko", v, w)

    re, im = z[:, :, kept].real, z[:, :, kept].imag
    real1[:, :, kept] = F.relu(product(re, w1[0]) - product(im, w1[1]) + b1[0])
    imag1[:, :, kept] = F.relu(product(im, w1[0]) + product(re, w1[1]) + b1[1])
    re, im = real1[:, :, kept], imag1[:, :, kept]
    real2[:, :, kept] = product(re, w2[0]) - product(im, w2[1]) + b2[0]
    imag2[:, :, kept] = product(im, w2[0]) + product(re, w2[1]) + b2[1]
    y = torch.view_as_complex(F.softshrink(torch.stack([real2, imag2], -1), mixer.threshold))
    y = y.reshape(batch, height, modes, dim)
    return torch.fft.irfft2(y, s=(height, width), dim=(1, 2), norm="ortho").to(x.dtype) + x


def _with_backward(function: Callable[[Tensor], Tensor], mixer: AFNO, x: Tensor, cotangent: Tensor) -> None:
    mixer.zero_grad()
    function(x.requires_grad_()).backward(cotangent)


def measure(grid: tuple[int, int], dim: int, batch: int, rounds: int) -> dict[str, Any]:
    """Ratios and bytes at one size, after checking that both compute the same.

    Raises:
        RuntimeError: the two disagree.
    """
    torch.manual_seed(0)
    mixer = create_mixer("afno", dim)
    assert isinstance(mixer, AFNO)
    x, cotangent = torch.randn(batch, *grid, dim), torch.randn(batch, *grid, dim)

    def baseline(t: Tensor) -> Tensor:
        return straightforward(mixer, t)

    with torch.no_grad():
        error = float((mixer(x) - baseline(x)).abs().max())
    if error > 1e-4:
        raise RuntimeError(f"afno and its straightforward formulation differ by {error}.")

    def inference(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x)

        return run

    forward = interleave({"ours": inference(mixer), "baseline": inference(baseline)}, rounds=rounds)
    training = interleave(
        {
            "ours": lambda: _with_backward(mixer, mixer, x, cotangent),
            "baseline": lambda: _with_backward(baseline, mixer, x, cotangent),
        },
        rounds=rounds,
    )
    result: dict[str, Any] = {"grid": list(grid), "dim": dim, "batch": batch, "threads": torch.get_num_threads()}
    for name, seconds in (("forward", forward), ("forward and backward", training)):
        result[name] = {
            **ratio(seconds["baseline"], seconds["ours"]),
            "ours_ms": 1e3 * sorted(seconds["ours"])[rounds // 2],
            "baseline_ms": 1e3 * sorted(seconds["baseline"])[rounds // 2],
        }
    result["memory"] = {
        "ours_bytes": measure_activation_bytes(mixer, x),
        "baseline_bytes": measure_activation_bytes(baseline, x),
    }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description="AFNO beside its straightforward formulation.")
    parser.add_argument("--grid", nargs=2, type=int, default=[64, 64])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    result = measure((options.grid[0], options.grid[1]), options.dim, options.batch, options.rounds)
    for name in ("forward", "forward and backward"):
        row = result[name]
        print(
            f"{name}: {row['ratio']:.2f} times as fast ({row['low']:.2f} to {row['high']:.2f}); "
            f"{row['ours_ms']:.0f} ms against {row['baseline_ms']:.0f} ms"
        )
    memory = result["memory"]
    print(f"kept for backward: {memory['ours_bytes'] / 2**20:.0f} MB against {memory['baseline_bytes'] / 2**20:.0f} MB")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

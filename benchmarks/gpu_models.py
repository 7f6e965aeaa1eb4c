"""Training steps and decoding of whole models on a GPU, in bfloat16, beside timm's and transformers' own.

    python -m mixerzoo.benchmarks.gpu_models train|decode [--json FILE] [--only MODEL ...] [--rehearse]

train: forward, loss, backward and AdamW under autocast, as it comes and with every block compiled; milliseconds, model
FLOPs utilisation (three forward passes' matmul flops of our model, by the card's dense bf16 rate) and peak memory.
decode: milliseconds of a token at batch 1 and 64, the difference of two lengths of `generate`, so that the prompt
is not counted.

Rows are written as they come; what fails is a row. `--rehearse`: small models on the CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mixerzoo.benchmarks.kernels import broken_context
from mixerzoo.kernels.common.costs import GPUS
from mixerzoo.models import create_model
from mixerzoo.models.generation import generate
from mixerzoo.training.cost import measure_flops
from torch import Tensor, nn

IMAGES = {"caformer_s18": 128, "vmamba_tiny": 64}  # batch at 224 x 224
TEXT = {"mamba2_130m": 8, "transformer_130m": 8, "hybrid_130m": 8}  # rows of 2048 tokens
DECODED = ("mamba2_130m", "transformer_130m")
REHEARSED = {"mamba2_130m": "mamba2_tiny", "transformer_130m": "transformer_tiny", "hybrid_130m": "hybrid_tiny"}
BATCHES = (1, 64)
ROUNDS = 10


def peer_of(name: str, vocabulary: int) -> nn.Module | None:
    """The same model by timm or transformers, where they have it; None where they have not."""
    if name in IMAGES:
        import timm

        return timm.create_model(name) if timm.is_model(name) else None
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 768, "vocab_size": vocabulary, "tie_word_embeddings": True}
    if name == "mamba2_130m":
        heads = {"num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128}
        return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(num_hidden_layers=24, **heads, **sizes))
    if name == "transformer_130m":
        heads = {"num_attention_heads": 12, "intermediate_size": 2048, "max_position_embeddings": 4096}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=12, **heads, **sizes))
    return None


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile every repeated block by itself: layers of one kind share the code, which the whole model would not."""
    chosen: set[nn.Module] = set()
    for module in model.modules():
        kinds = {type(child) for child in module.children()}
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and len(kinds) == 1:
            for child in module.children():
                if child not in chosen:
                    child.compile()
                    chosen.update(child.modules())
    return model


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def step_of(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    """A training step with AdamW under autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=x.device.type == "cuda")
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = _logits(model(x))
        nn.functional.cross_entropy(logits.flatten(0, -2).float(), target.flatten()).backward()
        optimizer.step()

    return run


def milliseconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Median time, the host's included, after three calls to warm up (off the GPU one and one)."""
    warmup, rounds = (3, rounds) if device == "cuda" else (1, 1)
    times = []
    for _ in range(warmup + rounds):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[warmup:])


def train(name: str, device: str, *, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    built = create_model(REHEARSED.get(name, name) if rehearse else name)
    vocabulary = getattr(built, "vocab_size", 0)
    if name in IMAGES:
        batch, side = (2, 64) if rehearse else (IMAGES[name], 224)
        x, target = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
    else:
        batch, length = (2, 64) if rehearse else (TEXT[name], 2048)
        x = target = torch.randint(vocabulary, (batch, length))
    x, target = x.to(device), target.to(device)
    makers: dict[str, Callable[[], nn.Module | None]] = {
        "ours": lambda: built,
        "ours, compiled": lambda: compile_blocks(create_model(REHEARSED.get(name, name) if rehearse else name)),
        "peer": lambda: None if rehearse and name in TEXT else peer_of(name, vocabulary),
    }
    flops = 0
    for what, make in makers.items():
        row: dict[str, Any] = {"model": name, "what": what, "batch": batch}
        try:
            model = make()
            if model is None:
                continue
            model = model.to(device)
            if what == "ours":
                flops = 3 * batch * measure_flops(model, x[:1], elementwise=False)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if what == "ours, compiled" and rehearse:
                torch.compiler.set_stance("force_eager")  # the compiler of CPUs takes minutes
            row["ms"] = milliseconds(step_of(model, x, target), device, ROUNDS)
            if device == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            rates = next((rates for gpu, rates in GPUS.items() if device == "cuda" and gpu in _card()), None)
            if rates and flops:
                row["mfu"] = flops / (1e-3 * row["ms"]) / rates[1]
        except Exception as failure:  # too little memory, a compiler: the next one goes on
            row["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:200]}".splitlines()[0]
        finally:
            torch.compiler.set_stance("default")
            model = None
        yield row


def _card() -> str:
    return torch.cuda.get_device_name()


def decode(name: str, device: str, *, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    short, long = (2, 4) if rehearse else (16, 64)

    def seconds(run: Callable[[int], object], tokens: int) -> float:
        best = float("inf")
        for _ in range(3 if device == "cuda" else 1):
            start = time.perf_counter()
            run(tokens)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    for what in ("ours", "peer"):
        if rehearse and what == "peer":
            continue
        for batch in BATCHES[:1] if rehearse else BATCHES:
            row: dict[str, Any] = {"model": name, "what": what, "batch": batch}
            try:
                ours: Any = create_model(REHEARSED[name] if rehearse else name)
                model: Any = ours if what == "ours" else peer_of(name, ours.vocab_size)
                model = model.to(device, torch.bfloat16).eval()
                prompt = torch.randint(1, ours.vocab_size, (batch, 8 if rehearse else 128), device=device)

                def run(tokens: int, model: Any = model, prompt: Tensor = prompt, what: str = what) -> object:
                    with torch.inference_mode():
                        if what == "ours":
                            return generate(model, prompt, max_new_tokens=tokens, temperature=0)
                        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
                        return model.generate(prompt, **options, pad_token_id=0, eos_token_id=None)

                row["ms"] = 1e3 * (seconds(run, long) - seconds(run, short)) / (long - short)
            except Exception as failure:  # as above
                row["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:200]}".splitlines()[0]
            yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Training steps and decoding on a GPU.")
    parser.add_argument("part", choices=("train", "decode"))
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL", choices=[*IMAGES, *TEXT])
    parser.add_argument("--json", metavar="FILE", help="append rows there, one JSON object a line, as they come")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.rehearse:
        print("There is no GPU.", file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    torch.manual_seed(0)
    names = options.only or ([*IMAGES, *TEXT] if options.part == "train" else DECODED)
    for name in names:
        for row in (train if options.part == "train" else decode)(name, device, rehearse=options.rehearse):
            result = row.get("failed") or f"{row['ms']:9.3f} ms" + (f"  MFU {row['mfu']:.1%}" if "mfu" in row else "")
            print(f"{name:18} {row['what']:15} batch {row['batch']:4} {result}", flush=True)
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
            if "failed" in row and broken_context():
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

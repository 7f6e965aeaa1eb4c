"""The door of every op: what `auto` takes on which tensors, and what the Triton paths of all ops have in common.

Without a GPU: tensors on "cuda" are fake, a card is what its properties say, and kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels.common import dispatch
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.common.dispatch import BackendError, check_shapes
from mixerzoo.kernels.common.registration import register_op
from mixerzoo.kernels.selftest.case import Draw
from mixerzoo.kernels.selftest.comparison import error, is_float, widen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

OPS = find_ops()
KEYS = {"block_sparse_attention": "D"} | dict.fromkeys(("gla", "ssd", "delta_rule"), "K")  # at most 256 on Triton
HALF = (torch.bfloat16, torch.float16)


def arguments(op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **dims: Any) -> dict[str, Any]:
    case = OPS[op]
    inputs = case.inputs(Draw(device, dtype if dtype.is_floating_point and dtype != torch.float64 else torch.float32),
                         **{**case.odd[0], **dims})  # fmt: skip
    return widen(inputs) if dtype == torch.float64 else inputs


def floats(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if is_float(v)}


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The last part of every module that a call took its function from."""
    found: list[str] = []
    original = dispatch._import

    def note(module: str) -> None:
        found.append(module.rpartition(".")[2])
        original(module)

    monkeypatch.setattr(dispatch, "_import", note)
    return found


def on_gpu(inputs: dict[str, Any], mode: FakeTensorMode, index: int = 0) -> dict[str, Any]:
    """The same arguments as fake tensors on a GPU."""

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            with mode:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=f"cuda:{index}")
        if isinstance(x, tuple):
            return type(x)(*map(moved, x)) if hasattr(x, "_fields") else tuple(map(moved, x))
        return x

    return {k: moved(v) for k, v in inputs.items()}


# -- what `auto` takes


@pytest.mark.parametrize("op", OPS)
def test_auto_on_a_gpu_takes_triton_where_it_fits_and_eager_where_it_does_not(op, taken):
    mode = FakeTensorMode()
    case = OPS[op]
    for dtype in (*case.dtypes, torch.float64):
        inputs = on_gpu(arguments(op, dtype), mode)
        with mode:
            made = outputs(case.run(**inputs))
        wanted = outputs(case.run(**arguments(op, dtype)))
        assert [(y.shape, y.dtype) for y in made] == [(y.shape, y.dtype) for y in wanted]
        assert {y.device.type for y in made} == {"cuda"}
    kinds = ["triton" in name for name in taken[::2]]
    assert kinds == [True] * len(case.dtypes) + [False], taken


@pytest.mark.parametrize("op", KEYS)
def test_auto_leaves_large_keys_to_eager(op, taken):
    mode = FakeTensorMode()
    for keys, module in ((256, "triton"), (257, "eager")):
        inputs = on_gpu(arguments(op, torch.bfloat16, **{KEYS[op]: keys}), mode)
        with mode:
            OPS[op].run(**inputs)
        assert taken[-1] == module
    with pytest.raises(BackendError, match="keys of up to 256, not 257"), mode:
        OPS[op].run(**inputs, backend="triton")


@pytest.mark.parametrize("op", [op for op, case in OPS.items() if not case.gradients])
def test_auto_takes_steps_with_gradients_to_eager(op, taken):
    mode = FakeTensorMode()
    inputs = on_gpu(arguments(op), mode)
    for x in floats(inputs).values():
        x.requires_grad_()
    with mode:
        y, *_ = OPS[op].run(**inputs)
        assert taken[-1] == "reference"
        assert y.requires_grad
        with torch.no_grad():
            OPS[op].run(**inputs)
        assert "triton" in taken[-1]
        with pytest.raises(BackendError, match="has no gradient"):
            OPS[op].run(**inputs, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_named_triton_says_what_it_does_not_take(op):
    with pytest.raises(BackendError, match=r"computes in .* not (float64|complex128)"):
        OPS[op].run(**arguments(op, torch.float64), backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_inputs_lie_on_one_device(op):
    mode = FakeTensorMode()
    here, there = (on_gpu(arguments(op), mode, index) for index in (0, 1))
    last = list(floats(here))[-1]
    if len(floats(here)) > 1:
        with pytest.raises(ConfigError, match="several devices: cuda:0, cuda:1"), mode:
            OPS[op].run(**{**here, last: there[last]})
    with mode:
        assert {y.device.index for y in outputs(OPS[op].run(**there))} == {1}


def card(monkeypatch, capability: tuple[int, int]) -> None:
    dispatch._warn_first.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")


def fake_cuda() -> Tensor:
    with FakeTensorMode():
        return torch.empty(1, 4, 4, 8, device="cuda")


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "eager"), ((8, 0), "triton"), ((9, 0), "triton")])
def test_old_cards_take_eager(monkeypatch, capability, chosen):
    card(monkeypatch, capability)
    x = fake_cuda()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert dispatch.choose_backend("pool_mix", "auto", x) == chosen
        assert dispatch.choose_backend("shift", "auto", x) == chosen
    assert [str(w.message) for w in heard] == (
        ["mixerzoo takes the slower PyTorch path: Tesla T4 has compute capability 7.5, Triton's kernels need 8.0."]
        if chosen == "eager"
        else []
    )
    if chosen == "eager":
        with pytest.raises(BackendError, match=r"compute capability 7\.5"):
            dispatch.choose_backend("pool_mix", "triton", x)
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD counts otherwise
    assert dispatch.choose_backend("pool_mix", "auto", x) == "triton"


def test_a_gpu_without_triton_is_said_once(monkeypatch):
    dispatch._warn_first.cache_clear()
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.warns(UserWarning, match="slower PyTorch path: the package triton is not installed"):
        assert dispatch.choose_backend("pool_mix", "auto", fake_cuda()) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose_backend("gla", "auto", fake_cuda()) == "eager"


def test_cpu_tensors_on_a_gpu_machine_are_refused(monkeypatch):
    import triton

    class Driver:
        def get_current_target(self) -> str:
            return "sm_90"

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver()))
    with pytest.raises(BackendError, match="the tensors are on cpu, its kernels run on cuda: move them there"):
        dispatch.choose_backend("pool_mix", "triton", torch.zeros(1))


# -- what all Triton paths have in common


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current device, whatever the tensors are on."""
    current = [0]

    def exchange(index: int) -> int:
        before, current[0] = current[0], index if index >= 0 else current[0]
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    launched: list[int] = []

    def launch(scale: float, x: Tensor) -> Tensor:
        launched.append(current[0])
        return x

    run = register_op("test_door_probe", launch, "x")
    with FakeTensorMode():
        run.op._init_fn(1.0, torch.empty(3, device="cuda:1"))
    run.op._init_fn(1.0, torch.empty(3))
    assert launched == [1, 0]
    assert current == [0]


@pytest.fixture
def new_settings():
    """PyTorch's newer setting for float32 products; afterwards as before."""
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_precision_follows_either_setting(new_settings, monkeypatch):
    import triton.language as tl
    from mixerzoo.kernels.common import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(tiles, "on_nvidia", lambda: True)
    assert tiles.precision(torch.float32) == "tf32x3"
    torch.set_float32_matmul_precision("high")
    assert tiles.precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    for own, overall, expected in (
        ("tf32", "none", "tf32"),
        ("ieee", "tf32", "tf32x3"),
        ("none", "tf32", "tf32"),
        ("none", "none", "tf32x3"),
    ):
        new_settings.fp32_precision, torch.backends.fp32_precision = own, overall
        assert tiles.precision(torch.float32) == expected
        assert [tiles.precision(dtype) for dtype in HALF] == ["ieee", "ieee"]
    new_settings.fp32_precision = "tf32"
    monkeypatch.setattr(tiles, "on_nvidia", lambda: False)  # AMD's compiler knows no TF32 but on gfx942
    assert [tiles.precision(dtype) for dtype in (torch.float32, *HALF)] == ["ieee"] * 3


@pytest.mark.parametrize("op", ["gla", "token_mlp", "spectral_mlp", "block_sparse_attention"])
def test_kernels_run_after_the_newer_setting(op, new_settings):
    new_settings.fp32_precision = "tf32"
    inputs = arguments(op, **({"L": 5} if op == "gla" else {}))
    wanted = outputs(OPS[op].run(**widen(inputs), backend="reference"))[0]
    assert error(outputs(OPS[op].run(**inputs, backend="triton"))[0], wanted) < 2e-5


@pytest.mark.parametrize("op", OPS)
def test_nan_comes_out_where_the_definition_has_it(op):
    """A maximum, a minimum or a comparison must not swallow it, for any input."""
    run = OPS[op].run
    small = {"L": 9, "documents": False, "mask": False}
    dims = {name: value for name, value in small.items() if name in OPS[op].odd[0]}
    plain = arguments(op, **dims)
    extra = [{}] + [{"activation": name} for name in ("relu",) if op in ("token_mlp", "spectral_mlp")]
    for options in extra:
        for name, x in floats(plain).items():
            poisoned = x.clone()
            poisoned.view(-1)[x.numel() // 2] = float("nan")
            inputs = plain | options | {name: poisoned}
            wanted = outputs(run(**inputs, backend="reference"))
            assert any(y.isnan().any() for y in wanted), name
            for backend in ("eager", "triton"):
                for ours, theirs in zip(outputs(run(**inputs, backend=backend)), wanted, strict=True):
                    assert ours.isnan()[theirs.isnan()].all(), f"{backend} swallows the NaN of {name}"


@pytest.mark.parametrize("op", ["ssd", "gla", "delta_rule"])
def test_states_beyond_the_range_of_float16(op):
    """Without decay a state grows past 65504; read by small queries it gives numbers that float16 holds."""
    inputs = arguments(op, torch.float16, B=1, L=200, H=1, K=16, V=8, **({"G": 1} if op == "ssd" else {}))
    inputs |= {
        name: None for name in ("document_ids", "initial_state", "beta") if name in inputs and op != "delta_rule"
    }
    inputs["k"], inputs["v"] = torch.ones_like(inputs["k"]), torch.full_like(inputs["v"], 1000.0)
    inputs["q"] = torch.full_like(inputs["q"], 2.0**-12)
    if inputs.get("g") is not None:
        inputs["g"] = torch.zeros_like(inputs["g"])
    if op == "delta_rule":  # what the state already answers is subtracted: a key of its own for every token
        inputs |= {"k": torch.eye(16).repeat(13, 1)[:200].view_as(inputs["k"]).half() * 2.0**-3, "document_ids": None,
                   "beta": torch.ones_like(inputs["beta"]), "initial_state": None}  # fmt: skip
        inputs["v"] = torch.full_like(inputs["v"], 60000.0)
    inputs["return_final_state"] = True
    y, state = OPS[op].run(**inputs, backend="triton")
    wanted, wanted_state = OPS[op].run(**widen(inputs), backend="reference")
    assert wanted_state.abs().max() > 65504
    assert error(state, wanted_state) < 1e-5
    assert error(y, wanted) < 1.25e-3


class Zeros(TorchDispatchMode):
    """The most elements that were filled with zeros at once."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("zeros", "new_zeros", "zeros_like", "zero_") and isinstance(made, Tensor):
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("op", ["token_mlp", "gla", "ssd", "delta_rule", "selective_scan", "pool_mix"])
def test_gradients_of_unused_outputs_are_no_memory(op):
    inputs = arguments(op)
    leaves = {k: v.requires_grad_() for k, v in floats(inputs).items()}
    y = outputs(OPS[op].run(**inputs | leaves, backend="triton"))[0]
    cotangent = torch.ones_like(y)
    with Zeros() as zeros:
        torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True)
    assert zeros.most <= (0 if op != "selective_scan" else inputs["A"].numel() * y.shape[0])  # that of its last state


TUNING = """
import sys
from types import SimpleNamespace
import torch, triton
from triton.runtime import autotuner, driver
from triton.runtime.jit import JITFunction
from mixerzoo.kernels.common.discovery import find_ops
from mixerzoo.kernels.selftest.case import Draw
from mixerzoo.kernels.selftest.comparison import evaluate

target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda *_: 0,
    get_active_torch_device=lambda: torch.device("cpu"), get_benchmarker=lambda: None,
    get_empty_cache_for_benchmark=lambda: None,
))
timed = []
autotuner.Autotuner._bench = lambda self, *args, config, **meta: timed.append(self.base_fn.__name__) or [1.0, 1.0, 1.0]
JITFunction.run = lambda self, *args, **kwargs: None
for name, case in find_ops().items():
    growing = [d for d in ("L", "grid", "modes") if d in case.odd[0]] + ["B"]
    first = None
    for i in range(10):
        dims = dict(case.odd[0])
        for d in growing:
            more = i if d == "B" else 65 + i
            dims[d] = tuple(n + more for n in dims[d]) if isinstance(dims[d], tuple) else dims[d] + more
        inputs = case.inputs(Draw(dtype=case.dtypes[0], fill=False), **dims)
        evaluate(case.run, inputs, gradients=case.gradients, seed=None, backend="triton")
        first = len(timed) if first is None else first
    print(name, first, len(timed) - first, sep=",")
    timed.clear()
"""


def test_new_sizes_are_not_tuned_anew(tmp_path):
    """Lengths, images and batches of ten new sizes, one after the other, with a tuner that only counts."""
    script = tmp_path / "tuning.py"
    script.write_text(TUNING)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert {op for op, *_ in rows} == set(OPS)
    assert sum(int(first) for _, first, _ in rows) >= 10, "tuned at all"
    again = {op: int(more) for op, _, more in rows if int(more)}
    assert not again


def test_shapes():
    x, w = torch.zeros(2, 3, 4, 5), torch.zeros(5, 7)
    assert check_shapes("op", x=("B *grid C", x), w=("C K", w), none=("Q", None))["K"] == 7
    check_shapes("op", w=("C K", w), state=("K-1 2", torch.zeros(6, 2)))
    with pytest.raises(ConfigError, match=r"op: w has shape \(5, 7\); expected \(4, any\), which is \(C, K\)"):
        check_shapes("op", x=("C", x[0, 0, :, 0][:0].new_zeros(4)), w=("C K", w))
    with pytest.raises(ConfigError, match=r"mask has shape \(2, 3\); expected \(2, 3, 4\), which is \(B, \*grid\)"):
        check_shapes("op", x=("B *grid C", x), mask=("B *grid", x[:, :, 0, 0]))
    with pytest.raises(ConfigError, match=r"b has shape \(3,\); expected \(2,\)"):
        check_shapes("op", b=("2", torch.zeros(3)))
    with pytest.raises(ConfigError, match="document_ids must be integers"):
        check_shapes("op", document_ids=("B", torch.zeros(3)))


def test_public_names_are_those_of_the_folders():
    """At run time by discovery; for type checkers from a file that `python -m mixerzoo.tools.kernel_docs` writes."""
    import mixerzoo.kernels as face
    from mixerzoo.kernels.common.public import op_modules, stub

    assert {"gla", "pool_mix", "block_sparse_attention"} <= set(op_modules())
    for module in op_modules().values():
        assert all(getattr(face, name) is getattr(module, name) for name in module.__all__)
        assert set(module.__all__) <= set(face.__all__)
    assert Path(str(face.__file__)).with_suffix(".pyi").read_text() == stub()

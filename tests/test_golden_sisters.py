"""Golden tests take any fixture of their kind: here are ones of other sizes and options than those of the repository.

Where the official code can be installed (timm, transformers), it computes them. Others have the repository's names of
parameters with other sizes, and numbers of our own in float64: they show that sizes are read from the fixture.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm.models.metaformer as metaformer
import torch
from mixerzoo.models.interop import huggingface  # noqa: F401 - hides the folder `kernels` from transformers
from mixerzoo.tests import utils
from mixerzoo.tests.utils import Golden, load_golden
from safetensors.torch import save_file
from timm.models import mlp_mixer
from torch import Tensor, nn
from transformers import (
    FNetConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.models.fnet import modeling_fnet as fnet
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer


def noise(shape: Any, seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def computed(
    module: nn.Module, inputs: Mapping[str, Tensor], run: Callable[..., Tensor], cotangent: Tensor | None = None
) -> dict[str, Tensor]:
    """Output, cotangent and gradients of a module, by the fixtures' keys."""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    y = run(module, **{**inputs, **leaves})
    cotangent = noise(y.shape, 77) if cotangent is None else cotangent
    wanted = {f"grad.{k}": v for k, v in leaves.items()} | {f"grad.param.{n}": p for n, p in parameters.items()}
    grads = torch.autograd.grad((y * cotangent.to(y)).sum(), list(wanted.values()))
    return {"output": y.detach(), "cotangent": cotangent, **dict(zip(wanted, grads, strict=True))}


def official(
    module: nn.Module,
    kwargs: Mapping[str, Any],
    inputs: Mapping[str, Any],
    run: Callable[..., Tensor],
    *,
    call: Mapping[str, Any] | None = None,
    logits: bool = False,
) -> Golden:
    """A fixture by official code with random weights; `inputs` are tensors or shapes, by the fixtures' keys.

    Gradients whose own rounding is large are named, and those that are zero but for rounding.
    """
    module.eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.2 * noise(parameter.shape, i))
    given = {k: v if isinstance(v, Tensor) else noise(v, 99) for k, v in inputs.items()}
    single = computed(module, given, run)
    double = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    exact = computed(copy.deepcopy(module).double(), double, run, single["cotangent"])
    grads = {k: v for k, v in exact.items() if k.startswith("grad.param.")}
    largest = max((float(g.abs().max()) for g in grads.values()), default=0.0)
    noisy, zero = {}, []
    for key, grad in grads.items():
        if float(grad.abs().max()) < 1e-10 * largest:
            zero.append(key.removeprefix("grad.param."))
        elif (off := utils.relative_error(single[key], grad)) > 2e-6:
            noisy[key.removeprefix("grad.param.")] = off
    if logits:
        single = {f"{k}.logits" if "." not in k else k: v for k, v in single.items()}
    params = {f"param.{n}": v.detach() for n, v in module.state_dict(keep_vars=True).items()}
    if "param.lm_head.weight" in params and kwargs.get("tie_word_embeddings"):
        del params["param.lm_head.weight"]
    meta = {"kwargs": kwargs, "call_kwargs": call or {}, "noisy_grad_params": noisy, "zero_grad_params": zero}
    return Golden({**params, **given, **single}, {k: json.dumps(v) for k, v in meta.items()})


def simple(module: nn.Module, kwargs: Mapping[str, Any], *shape: int) -> Golden:
    """One input, one output."""
    return official(module, kwargs, {"input": shape}, lambda m, input: m(input))


def named(value: Any) -> Any:
    """A class for its full name, in lists, too."""
    if isinstance(value, list):
        return [named(v) for v in value]
    if not isinstance(value, str) or "." not in value:
        return value
    module, _, name = value.rpartition(".")
    return getattr(importlib.import_module(module), name)


MF = "timm.models.metaformer."
SIZES = {"depths": [2, 1, 1, 2], "dims": [4, 6, 10, 12], "num_classes": 3}


def whole(**kwargs: Any) -> Golden:
    return simple(metaformer.MetaFormer(**{k: named(v) for k, v in kwargs.items()}), kwargs, 2, 3, 64, 32)


def timm_block() -> Golden:
    kwargs = {
        "dim": 6, "token_mixer": MF + "SepConv", "mlp_act": "torch.nn.GELU", "mlp_bias": True, "use_nchw": True,
        "norm_layer": MF + "GroupNorm1NoBias", "layer_scale_init_value": 0.1, "res_scale_init_value": None,
    }  # fmt: skip
    return simple(metaformer.MetaFormerBlock(**{k: named(v) for k, v in kwargs.items()}), kwargs, 3, 6, 5, 7)


def fnet_layer() -> Golden:
    kwargs = {"hidden_size": 6, "intermediate_size": 10, "hidden_act": "relu", "layer_norm_eps": 1e-6}
    golden = official(
        fnet.FNetLayer(FNetConfig(**kwargs, use_tpu_fourier_optimizations=False)), kwargs,
        {"input.hidden_states": (2, 5, 6)}, lambda m, **given: m(*given.values())[0],
    )  # fmt: skip
    x = golden["input.hidden_states"]
    golden.tensors["output.fourier"] = torch.fft.fftn(x.double(), dim=(1, 2)).real.float()
    return golden


MAMBA = {
    "hidden_size": 6, "state_size": 3, "conv_kernel": 3, "expand": 4, "time_step_rank": 2, "use_bias": True,
    "use_conv_bias": False,
}  # fmt: skip
MAMBA2 = {
    "hidden_size": 6, "num_heads": 6, "head_dim": 3, "state_size": 3, "n_groups": 3, "conv_kernel": 3, "expand": 3,
    "chunk_size": 5, "use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-3,
}  # fmt: skip
LIMIT = {"time_step_limit": [0.3, "inf"]}


def mamba(kind: type[nn.Module], kwargs: Mapping[str, Any], *, mask: bool = False) -> Golden:
    config = MambaConfig if kind is MambaMixer else Mamba2Config
    given = {**kwargs, **({"time_step_limit": (0.3, float("inf"))} if config is Mamba2Config else {})}
    inputs: dict[str, Any] = {"input.hidden_states": (2, 7, 6)}
    if mask:
        inputs["input.attention_mask"] = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])

    def run(module: nn.Module, **given: Tensor) -> Tensor:
        names = {k.removeprefix("input."): v for k, v in given.items()}
        return module(names.pop("hidden_states"), **names)

    return official(kind(config(**given, num_hidden_layers=1), layer_idx=0), kwargs, inputs, run)


def mamba_lm(kind: type[nn.Module], config: Any, kwargs: Mapping[str, Any]) -> Golden:
    ids = torch.arange(16).view(2, 8) * 7 % kwargs["vocab_size"]
    run = lambda m, **given: m(*given.values(), use_cache=False).logits  # noqa: E731
    return official(kind(config(**kwargs)), kwargs, {"input.input_ids": ids}, run, logits=True)


LM = {"vocab_size": 11, "num_hidden_layers": 3}
MLP = "models.test_mlp_models."
META = "models.test_metaformer_golden."
WHOLE = META + "test_model_equals_official"
BLOCK = MLP + "test_isotropic_block_equals_timm"
SSM = "mixers.recurrent.test_ssm.test_golden"
FOURIER = "mixers.spectral.test_fourier."
LANGUAGE = "models.conversion.test_language_conversion.test_golden"
V1 = {
    "token_mixers": MF + "Pooling", "downsample_norm": None, "mlp_act": "torch.nn.GELU", "mlp_bias": True,
    "norm_layers": "timm.layers.GroupNorm1", "layer_scale_init_values": 1e-5, "res_scale_init_values": None,
    "use_mlp_head": False,
}  # fmt: skip
V2 = {"token_mixers": MF + "Pooling", "norm_layers": MF + "GroupNorm1NoBias", "use_mlp_head": False}
MIXED = [MF + "SepConv", MF + "Attention", MF + "SepConv", MF + "Attention"]
PLAIN = [MF + "LayerNorm2dNoBias", MF + "LayerNormNoBias"] * 2

# name of the fixture -> the test that reads it, its arguments, and another fixture of that name
OFFICIAL: dict[str, tuple[str, tuple[Any, ...], Callable[[], Golden]]] = {
    "poolformer_pooling": (
        META + "test_pooling_equals_timm", (),
        lambda: simple(metaformer.Pooling(pool_size=5), {"pool_size": 5}, 3, 5, 6, 9),
    ),
    "metaformer_sepconv": (
        META + "test_separable_conv_equals_timm", (),
        lambda: simple(
            metaformer.SepConv(6, expansion_ratio=3, kernel_size=5, padding=2),
            {"dim": 6, "expansion_ratio": 3, "kernel_size": 5, "padding": 2}, 3, 6, 7, 5,
        ),
    ),
    "metaformer_attention": (
        "mixers.attention.test_attention.test_golden", ("metaformer_attention",),
        lambda: simple(metaformer.Attention(12, head_dim=4), {"dim": 12, "head_dim": 4}, 3, 7, 12),
    ),
    "poolformerv2_block": (META + "test_block_equals_official", (2,), timm_block),
    "metaformer_poolformer": (
        WHOLE, ("metaformer_poolformer", "poolformer_s12", "timm metaformer"), lambda: whole(**SIZES, **V1)
    ),
    "metaformer_poolformerv2": (
        WHOLE, ("metaformer_poolformerv2", "poolformerv2_s12", "timm metaformer"), lambda: whole(**SIZES, **V2)
    ),
    "metaformer_caformer": (
        WHOLE, ("metaformer_caformer", "caformer_s18", "timm metaformer"),
        lambda: whole(
            depths=[1, 2, 1, 1], dims=[4, 8, 6, 12], num_classes=3, head_dim=4, token_mixers=MIXED, norm_layers=PLAIN
        ),
    ),
    "mlp_mixer_block": (
        BLOCK, ("mlp_mixer_block", "mixer_s16"),
        lambda: simple(
            mlp_mixer.MixerBlock(10, 7, mlp_ratio=(1.5, 2.0)), {"dim": 10, "seq_len": 7, "mlp_ratio": [1.5, 2.0]},
            3, 7, 10,
        ),
    ),
    "resmlp_block": (
        BLOCK, ("resmlp_block", "resmlp_12"),
        lambda: simple(mlp_mixer.ResBlock(8, 5, mlp_ratio=3), {"dim": 8, "seq_len": 5, "mlp_ratio": 3}, 3, 5, 8),
    ),
    "gmlp_block": (
        BLOCK, ("gmlp_block", "gmlp_ti16"),
        lambda: simple(
            mlp_mixer.SpatialGatingBlock(8, 6, mlp_ratio=2), {"dim": 8, "seq_len": 6, "mlp_ratio": 2}, 3, 6, 8
        ),
    ),
    "gmlp_sgu": (
        "mixers.mlp.test_mlp.test_spatial_gating_unit_equals_timm", (),
        lambda: simple(mlp_mixer.SpatialGatingUnit(12, 5), {"dim": 12, "seq_len": 5}, 3, 5, 12),
    ),
    "mlp_mixer_model": (
        MLP + "test_mixer_model_equals_timm", (),
        lambda: simple(
            mlp_mixer.MlpMixer(3, (8, 12), patch_size=2, num_blocks=1, embed_dim=6, mlp_ratio=(2, 1)),
            {"num_classes": 3, "img_size": [8, 12], "patch_size": 2, "num_blocks": 1, "embed_dim": 6,
             "mlp_ratio": [2, 1]},
            2, 3, 8, 12,
        ),
    ),
    "fnet_mixing": (
        FOURIER + "test_golden_fnet", (),
        lambda: official(
            fnet.FNetBasicFourierTransform(FNetConfig(use_tpu_fourier_optimizations=False)), {"hidden_size": 5},
            {"input": (3, 8, 5)}, lambda m, input: m(input)[0],
        ),
    ),
    "fnet_fourier_block": (
        FOURIER + "test_golden_fnet_block", (),
        lambda: official(
            fnet.FNetFourierTransform(FNetConfig(hidden_size=7, use_tpu_fourier_optimizations=False)),
            {"hidden_size": 7}, {"input": (3, 8, 7)}, lambda m, input: m(input)[0],
        ),
    ),
    "fnet_layer": (FOURIER + "test_golden_fnet_layer", (), fnet_layer),
    "mamba1_mixer": (SSM, ("mamba1_mixer",), lambda: mamba(MambaMixer, MAMBA)),
    "mamba1_mixer_padmask": (SSM, ("mamba1_mixer_padmask",), lambda: mamba(MambaMixer, MAMBA, mask=True)),
    "mamba2_mixer": (SSM, ("mamba2_mixer",), lambda: mamba(Mamba2Mixer, {**MAMBA2, **LIMIT})),
    "mamba2_mixer_padmask": (
        SSM, ("mamba2_mixer_padmask",), lambda: mamba(Mamba2Mixer, {**MAMBA2, **LIMIT}, mask=True)
    ),
    "mamba1_lm": (
        LANGUAGE, ("mamba1_lm", None),
        lambda: mamba_lm(
            MambaForCausalLM, MambaConfig,
            {**MAMBA, **LM, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
        ),
    ),
    "mamba2_lm": (
        LANGUAGE, ("mamba2_lm", None),
        lambda: mamba_lm(Mamba2ForCausalLM, Mamba2Config, {**MAMBA2, **LM, "tie_word_embeddings": True}),
    ),
}  # fmt: skip


def found(path: str) -> tuple[Any, Callable[..., None]]:
    module, _, name = path.rpartition(".")
    loaded = importlib.import_module(f"mixerzoo.tests.{module}")
    return loaded, getattr(loaded, name)


def lay(golden: Golden, name: str, folder: Path) -> None:
    save_file(
        {k: v.clone().contiguous() for k, v in golden.tensors.items()}, folder / f"{name}.safetensors", golden.meta
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_other_official_fixtures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, arguments, make = OFFICIAL[name]
    _, test = found(path)
    arguments = tuple(tmp_path if a is None else a for a in arguments)
    golden = make()
    monkeypatch.setattr(utils, "GOLDEN", tmp_path)
    lay(golden, name, tmp_path)
    test(*arguments)
    output = next(k for k in golden.tensors if k in ("output", "output.logits"))
    golden.tensors[output] = golden[output] * 1.001
    lay(golden, name, tmp_path)
    with pytest.raises(AssertionError):
        test(*arguments)


# name -> the test, its arguments, other kwargs, and which sizes of the repository's fixture become which
STRIP = {16: 32, 8: 16, 6: 5, 12: 20, 13: 11, 24: 48, 4: 8}
RESIZED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], dict[int, int]]] = {
    "stripmlp_block": (
        MLP + "test_strip_mixer_equals_official", ("stripmlp_block",), {"channels": 32, "H": 5, "W": 5}, STRIP
    ),
    "stripmlp_channel_mixing": (
        MLP + "test_strip_channel_mixing_equals_official", (), {"in_channel": 8}, {12: 8, 36: 24}
    ),
    "raftmlp_level": (
        MLP + "test_raft_level_equals_official", ("raftmlp_level",),
        {"out_channels": 10, "pretrained_image_size": 14, "patch_size": 2, "token_expansion_factor": 1},
        {8: 10, 48: 12, 20: 14, 10: 14, 5: 7, 32: 40},
    ),
    "ninformer_block": (
        MLP + "test_ninformer_block_equals_official", (),
        {"d_model": 8, "d_ffn": 20, "seq_len": 7}, {12: 8, 16: 20, 10: 7},
    ),
    "ninformer_mgu": (
        "mixers.mlp.test_mlp.test_mixer_gating_unit_equals_official", (),
        {"dim": 8, "token_dim": 9, "channel_dim": 20, "seq_len": 7}, {12: 8, 14: 9, 18: 20, 10: 7},
    ),
    "afno2d_hsf": (
        FOURIER + "test_golden_afno_2d", ("afno2d_hsf",),
        {"hidden_size": 24, "sparsity_threshold": 0.1}, {36: 25, 16: 24, 8: 12},
    ),
    "vmamba_ss2d_v0": (
        "mixers.recurrent.test_ss2d.test_golden", ("vmamba_ss2d_v0",),
        {"d_model": 12, "ssm_ratio": 1.0}, {8: 12, 64: 48, 16: 12, 32: 24, 6: 5},
    ),
    "vmamba_vssblock": (
        "models.test_ssm_models.test_block_of_vmamba_equals_official", (), {"hidden_dim": 12}, {8: 12, 32: 48, 6: 5}
    ),
}  # fmt: skip


def other_sizes(name: str, kwargs: Mapping[str, Any], sizes: Mapping[int, int]) -> Golden:
    """The repository's fixture with random numbers in tensors of other sizes, and no results yet."""
    own = load_golden(name)
    kept = {k: v for k, v in own.tensors.items() if k.startswith(("param.", "input")) and v.is_floating_point()}
    tensors = {k: v for k, v in own.tensors.items() if k.startswith("param.") and not v.is_floating_point()}
    for i, (key, value) in enumerate(kept.items()):
        shape = [sizes.get(size, size) for size in value.shape]
        tensors[key] = value.std().nan_to_num(1.0) * noise(shape, i) + value.mean()
        if key.endswith("running_var"):
            tensors[key] = tensors[key].abs() + 0.5
    return Golden(tensors, {**own.meta, "kwargs": json.dumps({**own.kwargs, **kwargs}), "noisy_grad_params": "{}"})


@pytest.mark.parametrize("name", RESIZED)
def test_fixtures_of_other_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own module in float64, with the weights that the test gives it, computes what the fixture lacks."""
    path, arguments, kwargs, sizes = RESIZED[name]
    module, test = found(path)
    golden = other_sizes(name, kwargs, sizes)

    def record(
        _: Golden, ours: nn.Module, convert: Any, *, to_ours: Any = lambda x: x, to_theirs: Any = lambda y: y
    ) -> None:
        params = {k: v.double() if v.is_floating_point() else v for k, v in golden.params.items()}
        trained = {k: v.requires_grad_() for k, v in params.items() if v.is_floating_point() and "running" not in k}

        def run(_: nn.Module, input: Tensor) -> Tensor:
            return to_theirs(torch.func.functional_call(ours.double().eval(), dict(convert(params)), (to_ours(input),)))

        results = computed(nn.ParameterDict(), {"input": golden["input"].double()}, run)
        y = run(ours, golden["input"].double())
        grads = torch.autograd.grad((y * results["cotangent"]).sum(), list(trained.values()))
        results |= {f"grad.param.{k}": g for k, g in zip(trained, grads, strict=True)}
        golden.tensors.update({k: v.float() for k, v in results.items()})

    lay(golden, name, tmp_path)
    monkeypatch.setattr(utils, "GOLDEN", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_golden", record)
        test(*arguments)
    lay(golden, name, tmp_path)
    test(*arguments)
    golden.meta["kwargs"] = json.dumps(load_own(name).kwargs)
    lay(golden, name, tmp_path)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):  # of the sizes of the repository's
        test(*arguments)


def load_own(name: str) -> Golden:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "GOLDEN", utils.OWN)
        return load_golden(name)

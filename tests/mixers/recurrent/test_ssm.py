"""Mamba-1 and Mamba-2 against transformers' numbers, their published initial values, and the contract."""

from __future__ import annotations

import math

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.recurrent.ssm import Mamba, Mamba2
from mixerzoo.mixers.state import state_bytes
from mixerzoo.tests.mixers import sequence_checks as checks
from mixerzoo.tests.utils import load_golden, relative_error
from mixerzoo.training.cost import measure_activation_bytes
from torch import Tensor


def from_mamba1(kwargs):
    return Mamba(
        kwargs["hidden_size"],
        d_state=kwargs["state_size"],
        d_conv=kwargs["conv_kernel"],
        expand=kwargs["expand"],
        dt_rank=kwargs["time_step_rank"],
        bias=kwargs["use_bias"],
        conv_bias=kwargs["use_conv_bias"],
    )


def from_mamba2(kwargs):
    return Mamba2(
        kwargs["hidden_size"],
        d_state=kwargs["state_size"],
        d_conv=kwargs["conv_kernel"],
        expand=kwargs["expand"],
        head_dim=kwargs["head_dim"],
        ngroups=kwargs["n_groups"],
        bias=kwargs["use_bias"],
        conv_bias=kwargs["use_conv_bias"],
        dt_limit=tuple(map(float, kwargs["time_step_limit"])),
        norm_eps=kwargs["layer_norm_epsilon"],
    )


@pytest.mark.parametrize("name", ["mamba1_mixer", "mamba1_mixer_padmask", "mamba2_mixer", "mamba2_mixer_padmask"])
def test_golden(name):
    golden = load_golden(name)
    mixer = (from_mamba1 if name.startswith("mamba1") else from_mamba2)(golden.kwargs)
    mixer.load_state_dict(mixer.convert_official(golden.params))
    x = golden["input.hidden_states"].clone().requires_grad_()
    mask = golden.tensors.get("input.attention_mask")
    y = mixer(x, mask=None if mask is None else mask.bool())
    if mask is not None and golden.kwargs["use_bias"]:
        # Officially the bias of the projection at padding reaches real tokens through the convolution. Not so here.
        whole = mask.bool().all(1)
        assert relative_error(y[whole], golden["output"][whole]) < 1e-5
        return
    assert relative_error(y, golden["output"]) < 1e-5
    (y * golden["cotangent"]).sum().backward()
    assert relative_error(x.grad, golden["grad.input.hidden_states"]) < 2e-5
    expected = mixer.convert_official(golden.group("grad.param"))
    assert set(expected) == {n for n, _ in mixer.named_parameters()}
    for parameter, value in mixer.named_parameters():
        assert relative_error(value.grad, expected[parameter]) < 2e-5, parameter


VARIANTS = {
    "mamba_k2": ("mamba", {"d_state": 4, "d_conv": 2, "bias": True, "conv_bias": False}),
    "mamba_k1": ("mamba", {"d_state": 4, "d_conv": 1}),
    "mamba2": ("mamba2", {"d_state": 8, "head_dim": 8}),
    "mamba2_groups": (
        "mamba2", {"d_state": 4, "head_dim": 4, "ngroups": 2, "dt_limit": (0.01, 0.3), "bias": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_contract(variant):
    name, options = VARIANTS[variant]
    check_options(name, options)
    checks.check_size_of_state(create_mixer(name, 16, **options), 16)


def test_mamba_initial_values():
    torch.manual_seed(0)
    mixer = Mamba(64)
    assert torch.allclose(-mixer.A_log.exp(), -torch.arange(1.0, 17.0).expand(128, 16))
    assert bool((mixer.D == 1).all())
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert float(dt.min()) >= 0.00099
    assert float(dt.max()) <= 0.1001
    # log-uniform: half of the steps lie below the geometric mean of the range
    assert abs(float((dt < 0.01).float().mean()) - 0.5) < 0.15
    assert float(mixer.dt_proj.weight.abs().max()) <= 0.5
    assert mixer.no_weight_decay() == {"A_log", "D", "dt_bias", "conv1d.bias"}


def test_mamba2_initial_values():
    torch.manual_seed(0)
    mixer = Mamba2(1024)
    a = mixer.A_log.exp()
    assert float(a.min()) >= 1.0
    assert float(a.max()) <= 16.0
    assert abs(float(a.mean()) - 8.5) < 2.5
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert float(dt.min()) >= 0.00099
    assert float(dt.max()) <= 0.1001
    assert bool((mixer.D == 1).all())
    assert bool((mixer.norm.weight == 1).all())
    assert mixer.no_weight_decay() == {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight"}


def test_state_size():
    assert state_bytes(Mamba(32).init_state(2)) == 2 * (64 * 16 * 4 + 3 * 64 * 4)
    assert state_bytes(Mamba2(32, d_state=16).init_state(2)) == 2 * (64 * 16 * 4 + 3 * (64 + 32) * 4)


def test_steps_of_60():
    """dt A down to -960 a token: scan and steps read what one token has written to the last digits of float32.

    Both before the norm. It divides by what a token reads, which nearly cancels for some of them, and so shows 1e-4.
    """
    torch.manual_seed(0)
    mixer = create_mixer("mamba2", 64, causal=True)
    read: list[Tensor] = []
    mixer.norm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        mixer.dt_bias.fill_(60.0)
        x, state = torch.randn(2, 100, 64), mixer.init_state(2)
        mixer(x)
        for t in range(100):
            _, state = mixer.step(x[:, t], state)
        mixer.double()(x.double())
    scan, steps, exact = read[0], torch.stack(read[1:-1], 1).view_as(read[0]), read[-1]
    assert relative_error(scan, exact) < 2e-6
    assert relative_error(steps, exact) < 2e-6


def test_mamba2_keeps_its_digits():
    """Decays of 1 to 24 as transformers draws them, 400 tokens: sums of logarithms near -1000 within a chunk."""
    torch.manual_seed(0)
    mixer = Mamba2(64, head_dim=16, d_state=32)
    with torch.no_grad():
        mixer.A_log.copy_(torch.linspace(1, 24, 8).log())
        mixer.dt_bias.fill_(1.0)
        x = torch.randn(1, 400, 64)
        y = mixer(x)
        exact = mixer.double()(x.double())
    assert relative_error(y, exact) < 2e-6


def test_half_precision_keeps_the_state_in_float32():
    mixer = Mamba2(16, d_state=8, head_dim=8).to(torch.bfloat16)
    x = torch.randn(1, 9, 16, dtype=torch.bfloat16)
    y, state = mixer.prefill(x)
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    y_t, state = mixer.step(x[:, 0], state)
    assert y_t.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: create_mixer("mamba", 16, d_state=0), "d_state"),
        (lambda: create_mixer("mamba", 16, dt_min=-1.0), "dt_min"),
        (lambda: Mamba2(16, head_dim=5), "head_dim"),
        (lambda: Mamba2(16, head_dim=8, ngroups=3), "ngroups"),
    ],
)
def test_errors(build, match):
    with pytest.raises(ConfigError, match=match):
        build()


def test_default_head_dim_divides():
    assert Mamba2(32).head_dim == 64
    assert Mamba2(48).head_dim == 48
    assert Mamba2(1024).head_dim == 64
    assert math.prod((Mamba2(53).head_dim, Mamba2(53).num_heads)) == 106


@pytest.mark.parametrize("build", [Mamba, Mamba2])
def test_training_memory_does_not_hold_the_states(build):
    """What a step keeps grows with L x dim: four times the states add little, twice the length doubles it."""

    def kept(length, d_state):
        return measure_activation_bytes(build(64, d_state=d_state), torch.randn(1, length, 64))

    base = kept(1024, 16)
    assert kept(2048, 16) < 2.1 * base
    # B and C have d_state numbers per token; the states would have d_state x 128, five times what is kept
    assert kept(1024, 64) < 1.5 * base

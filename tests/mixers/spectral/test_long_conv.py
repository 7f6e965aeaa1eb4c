"""Hyena and BaseConv against zoology's numbers, direct sums, and the contract."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.spectral.long_conv import BaseConv, LongConv, causal_fft_conv, fft_length
from mixerzoo.mixers.state import state_bytes
from mixerzoo.tests.mixers import sequence_checks as checks
from mixerzoo.tests.utils import load_golden, relative_error


def compare(golden, mixer):
    missing, unexpected = mixer.load_state_dict(mixer.convert_official(golden.params), strict=False)
    assert not missing
    assert not unexpected
    u = golden["input.u"].clone().requires_grad_()
    y = mixer(u)
    assert relative_error(y, golden["output"]) < 1e-5
    (y * golden["cotangent"]).sum().backward()
    assert relative_error(u.grad, golden["grad.input.u"]) < 2e-5
    expected = mixer.convert_official(golden.group("grad.param"))
    checked = 0
    for name, parameter in mixer.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 2e-5, name
        checked += 1
    assert checked == len(expected)


def test_golden_hyena():
    golden = load_golden("zoology_hyena")
    k = golden.kwargs
    mixer = LongConv(
        k["d_model"],
        l_max=k["l_max"],
        filter_order=k["filter_order"],
        emb_dim=k["emb_dim"],
        num_inner_mlps=k["num_inner_mlps"],
        short_filter_order=k["short_filter_order"],
        w=k["w"],
    )
    compare(golden, mixer)
    assert relative_error(mixer.kernel(golden["input.u"].shape[1], mixer.bias).T, golden["output.filter_k"]) < 1e-5
    assert relative_error(mixer.filter_fn.decay(), golden["buffer.filter_fn.modulation.deltas"].flatten().abs()) < 1e-6


@pytest.mark.parametrize("name", ["short", "implicit_long", "explicit_long"])
def test_golden_base_conv(name):
    golden = load_golden(f"zoology_baseconv_{name}")
    k = golden.kwargs
    options = {"kernel_size": k["kernel_size"], "l_max": k["l_max"], "use_act": k["use_act"]}
    compare(golden, BaseConv(k["d_model"], implicit_long_conv=k.get("implicit_long_conv", True), **options))


VARIANTS = {
    "hyena": ("long_conv", {"l_max": 256, "filter_order": 8, "w": 5.0}),
    "implicit": ("base_conv", {"l_max": 256, "kernel_size": -1}),
    "explicit": ("base_conv", {"l_max": 256, "kernel_size": -1, "implicit_long_conv": False, "use_act": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_contract(variant):
    name, options = VARIANTS[variant]
    check_options(name, options)
    checks.check_size_of_state(create_mixer(name, 8, **options), 8)


def test_fft_equals_the_sum():
    x, kernel = torch.randn(2, 13, 3, dtype=torch.float64).float(), torch.randn(13, 3)
    expected = torch.zeros_like(x)
    for t in range(13):
        for s in range(t + 1):
            expected[:, t] += kernel[t - s] * x[:, s]
    checks.close(causal_fft_conv(x, kernel), expected, 1e-5)


def test_fft_length():
    assert [fft_length(n) for n in (1, 2, 3, 17, 100)] == [2, 3, 5, 40, 256]
    for n in range(1, 70):
        assert fft_length(n) >= 2 * n - 1


def test_too_long():
    mixer = LongConv(8, l_max=10)
    with pytest.raises(ConfigError, match="l_max"):
        mixer(torch.randn(1, 11, 8))
    _, state = mixer.prefill(torch.randn(1, 10, 8))
    with pytest.raises(ConfigError, match="l_max"):
        mixer.step(torch.randn(1, 8), state)


def test_state_holds_the_past():
    assert state_bytes(LongConv(8, l_max=10).init_state(1)) == 4 * (2 * 24 + 10 * 8) + 8
    assert state_bytes(BaseConv(8).init_state(1)) == 4 * 2 * 8 + 8


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: create_mixer("long_conv", 8, l_max=0), "l_max"),
        (lambda: create_mixer("long_conv", 8, emb_dim=4), "emb_dim"),
        (lambda: create_mixer("long_conv", 8, num_inner_mlps=-1), "num_inner_mlps"),
        (lambda: create_mixer("base_conv", 8, kernel_size=0), "kernel_size"),
    ],
)
def test_errors(build, match):
    with pytest.raises(ConfigError, match=match):
        build()

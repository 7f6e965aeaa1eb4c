import math

import pytest
import torch
from mixerzoo.training.cost import (
    count_parameters,
    measure_activation_bytes,
    measure_flops,
    measure_throughput,
    peak_memory_bytes,
    spread,
)
from torch import nn
from torch.nn import functional as F


def test_matrix_products_are_two_per_multiply_add():
    x = torch.randn(5, 7, 16)
    assert measure_flops(nn.Linear(16, 24, bias=False), x) == 2 * 5 * 7 * 16 * 24
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    assert measure_flops(conv, torch.randn(2, 4, 8, 10), elementwise=False) == 2 * 2 * 6 * 80 * 4 * 9


def test_attention_grows_with_the_square():
    def cost(n):
        q = torch.randn(2, 3, n, 8)
        return measure_flops(lambda q: F.scaled_dot_product_attention(q, q, q), q, elementwise=False)

    assert cost(16) == 2 * 2 * (2 * 3) * 16 * 16 * 8
    assert cost(32) == 4 * cost(16)


def test_fft_formulas():
    x = torch.randn(3, 64)
    assert measure_flops(torch.fft.rfft, x, elementwise=False) == round(2.5 * 3 * 64 * 6)
    assert measure_flops(lambda x: torch.fft.irfft(torch.fft.rfft(x), n=64), x, elementwise=False) == round(
        2 * 2.5 * 3 * 64 * 6
    )
    assert measure_flops(torch.fft.fft2, torch.randn(2, 8, 16, dtype=torch.complex64)) == 5 * 2 * 128 * 7


def test_pointwise_work_is_counted_or_left_out():
    x = torch.randn(4, 10)
    assert measure_flops(lambda x: x * 2 + 1, x) == 80
    assert measure_flops(lambda x: x * 2 + 1, x, elementwise=False) == 0
    assert measure_flops(nn.Identity(), x) == 0
    assert measure_flops(lambda x: x.reshape(2, 20).transpose(0, 1).contiguous(), x) == 0
    pooled = torch.randn(1, 2, 6, 6)
    assert measure_flops(lambda x: F.avg_pool2d(x, 3, 1, 1), pooled) == 2 * 36 * 9


def test_counts_of_a_known_model():
    import timm

    model = timm.create_model("resnet18").eval()
    flops = measure_flops(model, torch.randn(1, 3, 224, 224), elementwise=False)
    assert math.isclose(flops / 2, 1.82e9, rel_tol=0.01)  # published: 1.8 GMACs
    assert count_parameters(model) == 11_689_512


def test_activation_bytes():
    x = torch.randn(8, 16)
    linear = nn.Linear(16, 32)
    assert measure_activation_bytes(linear, x) == x.numel() * 4  # its input, for the gradient of the weight
    linear.weight.requires_grad_(False)
    assert measure_activation_bytes(linear, x) == 0
    assert measure_activation_bytes(lambda x: (x.exp() * x.exp().T.T).sum(), x) == 2 * x.numel() * 4
    assert measure_activation_bytes(nn.ReLU(), x.bfloat16()) == x.numel() * 2


def test_activation_bytes_of_attention_are_linear_and_of_its_definition_square():
    def fused(q):
        return F.scaled_dot_product_attention(q, q, q)

    def dense(q):
        return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    def growth(function):
        small, large = (measure_activation_bytes(function, torch.randn(1, 2, n, 8)) for n in (128, 256))
        return large / small

    assert growth(fused) == pytest.approx(2, rel=0.05)
    assert growth(dense) > 3


def test_spread_and_throughput():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "p25": 2.0, "p75": 4.0, "count": 5}
    calls = []
    figures = measure_throughput(lambda: calls.append(1), 10, repeats=4, warmup=1)
    assert len(calls) == 5
    assert figures["count"] == 4
    assert 0 < figures["p25"] <= figures["median"] <= figures["p75"]
    assert peak_memory_bytes() > 1 << 20


def test_our_own_operators_are_looked_into():
    from mixerzoo.mixers import create_mixer

    x = torch.zeros(1, 6, 6, 32)
    assert measure_flops(create_mixer("pooling", 32), x) >= 36 * 32 * 9  # 3x3 windows, whoever computes them
    mlp = create_mixer("mlp_mixer", 32, grid=(6, 6))
    products = sum(2 * p.numel() for p in mlp.parameters() if p.ndim > 1) * 32
    figures = [
        measure_flops(mlp, x, elementwise=False) for _ in range(2)
    ]  # a second call: operators are registered late
    assert figures == [products, products]


def test_scans_grow_linearly():
    from mixerzoo.mixers import create_mixer

    mamba = create_mixer("mamba", 32)
    small, large = (measure_flops(mamba, torch.zeros(1, n, 32)) for n in (128, 256))
    assert large == pytest.approx(2 * small, rel=0.02)

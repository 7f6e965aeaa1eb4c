"""Linear attention and the delta rule against flash-linear-attention's numbers, closed forms, and the contract."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.contract.mixers import check_options
from mixerzoo.errors import ConfigError
from mixerzoo.kernels.ssd import ssd
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.recurrent.delta import Delta
from mixerzoo.mixers.recurrent.linear import LinearAttention, lightning_decay, retention_decay
from mixerzoo.tests.mixers import sequence_checks as checks
from mixerzoo.tests.utils import load_golden, relative_error

LINEAR = {
    "plain": {},
    "unnormalised": {"normalize": False, "feature_map": "silu", "d_conv": 3, "output_norm": True, "output_gate": True},
    "retention": {"decay": "retention", "position": "rotary", "feature_map": "identity", "normalize": False},
    "lightning": {"decay": "lightning", "num_heads": 2, "head_dim": 4, "lightning_rate": 6.0},
    "scalar": {"decay": "scalar", "gate_logit_normalizer": 2.0, "num_heads": 2, "head_v_dim": 6},
    "channel": {"decay": "channel", "gate_logit_normalizer": 2.0, "gate_rank": 3, "normalize": False},
}
DELTA = {
    "gated": {},
    "plain": {"gated": False, "output_gate": False, "head_v_dim": 6},
    "negative": {"allow_neg_eigval": True, "d_conv": 0, "num_heads": 2},
}


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_contract(variant):
    options = {"head_dim": 8, **LINEAR[variant]}
    check_options("linear_attention", options)
    checks.check_size_of_state(LinearAttention(16, **options), 16)


@pytest.mark.parametrize("variant", DELTA)
def test_delta_contract(variant):
    options = {"head_dim": 8, **DELTA[variant]}
    check_options(Delta.name, options)
    checks.check_size_of_state(Delta(16, **options), 16)


def test_normalised_linear_attention_is_a_weighted_mean():
    """Against the N x N form: weights phi(q) . phi(k), causal, rows summing to one."""
    mixer = checks.perturb(LinearAttention(16, head_dim=8))
    x = checks.tokens(2, 9, 16)
    q, k, v = (t.unflatten(-1, (2, 8)) for t in mixer.in_proj(x).split(16, -1))
    phi = torch.nn.functional.elu
    weights = torch.einsum("bihk,bjhk->bhij", phi(q) + 1, phi(k) + 1).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = mixer.out_proj(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2))
    checks.close(mixer(x), expected, 1e-5)


def test_float16_holds_the_sums_of_long_sequences():
    """After some thousand tokens the sum of the keys is beyond 65504, the weighted mean is not."""
    torch.manual_seed(0)
    mixer = LinearAttention(64, head_dim=64).half()
    x = torch.randn(1, 12000, 64, dtype=torch.float16)
    with torch.no_grad():
        y = mixer(x)
        y_t, _ = mixer.step(x[:, -1], mixer.prefill(x[:, :-1])[1])
        exact = mixer.double()(x.double())
    assert y.dtype == y_t.dtype == torch.float16
    errors = (y.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert errors.max() < 2e-3
    assert (y_t.double() - exact[:, -1]).abs().max() < 2e-3 * exact[:, -1].abs().max()


def test_retention_is_a_decayed_sum():
    """Against the N x N form with D_ij = gamma ** (i - j)."""
    mixer = checks.perturb(LinearAttention(16, head_dim=8, decay="retention", feature_map="identity", normalize=False))
    x = checks.tokens(1, 12, 16)
    q, k, v = (t.unflatten(-1, (2, 8)) for t in mixer.in_proj(x).split(16, -1))
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6])
    distance = torch.arange(12)[:, None] - torch.arange(12)[None]
    weights = torch.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5 * (gamma[:, None, None] ** distance).tril()
    expected = mixer.out_proj(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2))
    checks.close(mixer(x), expected, 1e-5)


def test_fixed_decays():
    assert torch.allclose(retention_decay(3).exp(), 1 - 2.0 ** -torch.tensor([5.0, 6.0, 7.0]))
    assert torch.allclose(lightning_decay(4, 8.0), -2.0 * torch.arange(4.0))


def test_golden_fixed_decays():
    """The published constants with the scan, outputs and gradients. Retention's fixture is head first."""
    golden = load_golden("fla_lightning_attn")
    layer = golden.kwargs
    batch, length, heads, _ = golden["input.q"].shape
    decay = lightning_decay(heads, 8.0 * (1 - layer["layer_idx"] / layer["num_layers"]))
    assert relative_error(decay, golden["output.g_gamma"]) < 1e-6
    q, k, v, initial = (golden[f"input.{n}"].clone().requires_grad_() for n in ("q", "k", "v", "initial_state"))
    y, state = ssd(
        q,
        k,
        v,
        decay.expand(batch, length, heads),
        scale=layer["scale"],
        initial_state=initial,
        return_final_state=True,
    )
    assert relative_error(y, golden["output.o"]) < 1e-5
    ((y * golden["cotangent.o"]).sum() + (state * golden["cotangent.final_state"]).sum()).backward()
    for name, tensor in (("q", q), ("k", k), ("v", v), ("initial_state", initial)):
        assert relative_error(tensor.grad, golden[f"grad.input.{name}"]) < 2e-5, name

    golden = load_golden("fla_retention")
    q, k, v = (golden[f"input.{n}"].transpose(1, 2).clone().requires_grad_() for n in "qkv")
    batch, length, heads, _ = q.shape
    y = ssd(q, k, v, retention_decay(heads).expand(batch, length, heads), scale=golden.kwargs["scale"])
    assert relative_error(y.transpose(1, 2), golden["output.o"]) < 1e-5
    (y.transpose(1, 2) * golden["cotangent.o"]).sum().backward()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        assert relative_error(tensor.grad.transpose(1, 2), golden[f"grad.input.{name}"]) < 2e-5, name


def test_delta_overwrites_what_a_key_held():
    """beta = 1, no decay: after writing (k, v1) and (k, v2), reading k gives v2 alone."""
    from mixerzoo.kernels.delta_rule import delta_rule

    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 8)
    y = delta_rule(k, k, v, torch.ones(1, 2, 1), scale=1.0)
    checks.close(y[:, 1], v[:, 1], 1e-5)


def test_initial_values():
    torch.manual_seed(0)
    delta = Delta(64, num_heads=64, head_dim=8)
    a = delta.A_log.exp()
    assert float(a.min()) >= 1.0
    assert float(a.max()) <= 16.0
    dt = torch.nn.functional.softplus(delta.dt_bias)
    assert float(dt.min()) >= 0.00099
    assert float(dt.max()) <= 0.1001
    assert delta.no_weight_decay() == {"A_log", "dt_bias", "norm.weight"}
    # xavier for every projection by itself, not for the packed matrix
    bound = 2**-2.5 * (6 / (64 + 512)) ** 0.5
    assert abs(float(delta.in_proj.weight[:512].abs().max()) - bound) < 0.01 * bound


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: create_mixer("linear_attention", 16, decay="exponential"), "decay"),
        (lambda: create_mixer("linear_attention", 16, feature_map="exp"), "feature_map"),
        (lambda: create_mixer("linear_attention", 16, head_dim=5, position="rotary"), "head_dim"),
        (lambda: create_mixer("linear_attention", 16, num_heads=0), "num_heads"),
        (lambda: create_mixer("delta", 16, d_conv=-1), "d_conv"),
    ],
)
def test_errors(build, match):
    with pytest.raises(ConfigError, match=match):
        build()

"""SS2D and the selective scan under it, against VMamba's numbers."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import grid_scan
from mixerzoo.kernels.selective_scan import selective_scan
from mixerzoo.mixers import create_mixer, mixer_class
from mixerzoo.mixers.recurrent import ss2d
from mixerzoo.tests.utils import check_golden, load_golden, relative_error


def last(x):
    return x.movedim(1, -1)


def first(x):
    return x.movedim(-1, 1)


@pytest.mark.parametrize("name", ["vmamba_ss2d_v0", "vmamba_ss2d_v05_noz"])
def test_golden(name):
    golden = load_golden(name)
    kwargs = golden.kwargs
    rank = kwargs.get("dt_rank", "auto")
    mixer = create_mixer(
        "ss2d",
        kwargs["d_model"],
        d_state=kwargs["d_state"],
        d_conv=kwargs.get("d_conv", 3),
        ssm_ratio=kwargs["ssm_ratio"],
        dt_rank=None if rank == "auto" else rank,
        gate=not kwargs["forward_type"].endswith("_noz"),
        conv_bias=kwargs.get("conv_bias", True),
        bias=kwargs.get("bias", False),
    )
    layout = {"to_ours": last, "to_theirs": first} if kwargs.get("channel_first", False) else {}
    check_golden(golden, mixer, mixer_class("ss2d").convert_official, **layout)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_selective_scan(backend):
    golden = load_golden("vmamba_selective_scan")
    inputs = {k: v.clone().requires_grad_() for k, v in golden.group("input").items()}
    u, delta = (inputs[k].transpose(1, 2) for k in ("u", "delta"))
    b, c = (inputs[k].permute(0, 3, 1, 2) for k in ("B", "C"))
    y = selective_scan(
        u, delta, inputs["A"], b, c, inputs["D"],
        delta_bias=inputs["delta_bias"], delta_softplus=True, backend=backend,
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    y = y.transpose(1, 2)
    assert relative_error(y, golden["output"]) < 1e-5
    (y * golden["cotangent"]).sum().backward()
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        assert relative_error(tensor.grad, golden[f"grad.input.{name}"]) < 2e-5, name


@pytest.mark.parametrize("scan", ["cross2d", "unidi", "bidi", "rot90"])
@pytest.mark.parametrize("gate", [True, False])
def test_scans_in_place_equal_scans_on_copies(scan, gate, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ss2d, "_SMALL", 0)
    calls = []
    monkeypatch.setattr(ss2d, "grid_scan", lambda *args: calls.append(1) or grid_scan(*args))
    mixer, x = create_mixer("ss2d", 8, scan=scan, gate=gate, d_state=2), torch.randn(2, 5, 9, 8, requires_grad=True)
    found = {}
    for kernels in ("eager", "reference"):
        monkeypatch.setenv("MIXERZOO_KERNELS", kernels)
        y = mixer(x)
        found[kernels] = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]
        assert len(calls) == 1, "in place, on CPUs, and only there"
    for ours, theirs in zip(*found.values(), strict=True):
        assert relative_error(ours, theirs) < 2e-5


def test_every_path_has_its_parameters():
    torch.manual_seed(0)
    mixer, x = create_mixer("ss2d", 8).eval(), torch.randn(1, 3, 5, 8)
    before = mixer(x)
    for path in range(4):
        other = create_mixer("ss2d", 8).eval()
        other.load_state_dict(mixer.state_dict())
        with torch.no_grad():
            other.D[path] += 1
        assert not torch.allclose(other(x), before, atol=1e-4)


@pytest.mark.parametrize(("option", "value"), [("d_conv", 4), ("d_state", 0), ("ssm_ratio", -1.0)])
def test_mistakes(option, value):
    with pytest.raises(ConfigError, match=rf"mixer\.{option}"):
        create_mixer("ss2d", 8, **{option: value})

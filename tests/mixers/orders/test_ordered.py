"""Mixers of sequences under token orders: the contract on grids, and both vision backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo import create_model
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.orders.ordered import Ordered
from mixerzoo.mixers.orders.orders import Order
from mixerzoo.mixers.registry import check_mixer
from mixerzoo.models.resize import resize_grid

NAMES = ["mamba", "mamba2", "linear_attention", "attention", "long_conv"]
SMALL: dict[str, dict[str, Any]] = {"mamba": {"d_state": 4}, "mamba2": {"d_state": 8}, "long_conv": {"l_max": 64}}
ORDERS: dict[str, Any] = {"cross": "cross_scan", "atrous": {"name": "atrous", "size": 2, "rate": 2}}
GRID, DIM = (3, 5), 16
PYRAMID = {
    "backbone": "pyramid", "dims": [8, 16], "depths": [1, 1], "downsample": {"name": "conv", "kernel_size": 2,
    "stride": 2, "padding": 0}, "stem": {"name": "conv", "kernel_size": 4, "stride": 4, "padding": 0},
    "image_size": [24, 16], "num_classes": 3, "in_chans": 1,
}  # fmt: skip
ISOTROPIC = {"backbone": "isotropic", "dim": 8, "depth": 2, "patch_size": 4, "image_size": [12, 20], "num_classes": 3,
             "in_chans": 1}  # fmt: skip


def build(name: str, order: Any, **options: Any) -> Ordered:
    torch.manual_seed(0)
    mixer = create_mixer(name, DIM, grid=GRID, order=order, **SMALL.get(name, {}), **options).eval()
    assert isinstance(mixer, Ordered)
    return mixer


def tokens(*, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, *GRID, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_is_the_mixer_on_every_path(name, order):
    mixer, x = build(name, ORDERS[order]), tokens()
    paths = Order(ORDERS[order])
    table, total = paths.table(GRID), torch.zeros_like(x).flatten(1, 2)
    for row in range(table.shape[0]):
        places = table.index.view(table.shape)[row]
        if table.valid is not None:
            places = places[table.valid[row]]
        total[:, places] += mixer.mixers[0](x.flatten(1, 2)[:, places])
    torch.testing.assert_close(mixer(x), total.view_as(x) / paths.paths, rtol=1e-4, atol=1e-5)
    raster = create_mixer(name, DIM, grid=GRID, causal=True, **SMALL.get(name, {})).eval()
    raster.load_state_dict(mixer.mixers[0].state_dict())
    assert not torch.allclose(mixer(x), raster(x), atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, order):
    for dtype in (torch.float32, torch.bfloat16):
        mixer, x = build(name, ORDERS[order]).to(dtype), tokens(dtype=dtype).requires_grad_()
        y = mixer(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        y.float().square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters() if p.requires_grad)
    mixer, x = build(name, ORDERS[order]), tokens()
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[1, :, 3:] = False
    other = torch.where(mask.unsqueeze(-1), x, 17 * tokens(seed=9))
    a, b = mixer(x, mask=mask), mixer(other, mask=mask)
    torch.testing.assert_close(a[mask], b[mask], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mixer(other)[mask], b[mask], rtol=1e-5, atol=1e-6)
    names = {n for n, _ in mixer.named_parameters()}
    assert {n for n, p in mixer.named_parameters() if p.ndim <= 1} <= mixer.no_weight_decay() <= names


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_break(name, order):
    mixer, x = build(name, ORDERS[order]), tokens().requires_grad_()
    torch._dynamo.reset()
    y, expected = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [PYRAMID, ISOTROPIC], ids=["pyramid", "isotropic"])
def test_both_backbones(config, name, order):
    torch.manual_seed(0)
    spec = {"name": name, "order": ORDERS[order], **SMALL.get(name, {})}
    model = create_model({**config, "mixer": spec})
    image = torch.randn(2, 1, *config["image_size"])
    logits = model(image)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(isinstance(m, Ordered) for m in model.modules()) == 2
    height, width = config["image_size"]
    assert model(torch.randn(1, 1, height + 8, width + 8)).isfinite().all()


def test_receptive_field_is_that_of_the_order():
    x = tokens().requires_grad_()

    def seen(order: Any, **options: Any) -> torch.Tensor:
        (grad,) = torch.autograd.grad(build("attention", order, **options)(x)[0, 1, 2].sum(), x)
        return grad[0].abs().sum(-1) > 0

    row, col = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    assert torch.equal(seen("raster"), row * 5 + col <= 7)
    assert torch.equal(seen("column"), col * 3 + row <= 7)
    assert torch.equal(seen("raster_reversed"), row * 5 + col >= 7)
    assert bool(seen("cross_scan").all())
    window = {"name": "atrous", "size": 2}
    assert torch.equal(seen(window, causal_paths=False), (row < 2) & (col >= 2) & (col < 4))
    assert torch.equal(seen(window), (row < 2) & (col >= 2) & (col < 4) & ((row < 1) | (col == 2)))


def test_merges():
    x = tokens()
    mean, total = build("mamba", "bidirectional")(x), build("mamba", "bidirectional", merge="sum")(x)
    torch.testing.assert_close(2 * mean, total)
    for merge in ("gated", "concat"):  # they start as the mean, and move away from it
        mixer = build("mamba", "bidirectional", merge=merge)
        mixer.load_state_dict(build("mamba", "bidirectional").state_dict(), strict=False)
        torch.testing.assert_close(mixer(x), mean)
        learned = mixer.gate if merge == "gated" else mixer.join
        torch.nn.init.normal_(learned.weight)
        assert not torch.allclose(mixer(x), mean, atol=1e-2)
        mixer.reset_parameters()
        assert not learned.weight.std() > 0.5


def test_parameters_that_depend_on_the_grid():
    order = {"name": "atrous", "size": 2}
    model = create_model({**ISOTROPIC, "image_size": 16, "mixer": {"name": "mlp_mixer", "order": order}})
    mixer = next(m for m in model.modules() if isinstance(m, Ordered))
    assert mixer.needs_grid
    assert (mixer.grid, mixer.mixers[0].grid) == ((4, 4), (4,))
    resize_grid(model, 24)
    assert (mixer.grid, mixer.mixers[0].grid) == ((6, 6), (4,))
    assert model(torch.randn(1, 1, 24, 24)).isfinite().all()
    assert resize_grid(model, 20)(torch.randn(1, 1, 20, 20)).isfinite().all()  # with shorter windows, masked
    with pytest.raises(ConfigError, match="shorter ones"):
        create_mixer("fnet", 8, order=order)(torch.randn(1, 5, 5, 8))


def test_three_axes():
    mixer = create_mixer(
        "mamba", 8, grid=(2, 3, 3), order=["rotary_major", "frame_interleaved_reversed"], layer_index=2
    )
    assert mixer(torch.randn(1, 2, 3, 3, 8)).shape == (1, 2, 3, 3, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mamba", "order": "crosscan"}, r'm.order: "crosscan" is not known. Did you mean "cross_scan"\?'),
        ({"name": "mamba", "oder": "raster"}, r'm.oder: mixer "mamba" has no such option. Did you mean "order"\?'),
        ({"name": "mamba", "order": ["raster", "x"]}, r'm.order\[1\]: "x" is not known'),
        ({"name": "mamba", "order": "raster", "merge": "max"}, "m.merge: 'max' is not of type"),
        ({"name": "mamba", "merge": "sum"}, "m.merge: it has no effect without `order`"),
        ({"name": "attention", "causal_paths": True}, "m.causal_paths: it has no effect without `order`"),
        ({"name": "raft", "order": "raster"}, r'm.order: the mixer "raft" takes \(2,\) grid axes'),
    ],
)
def test_mistakes_in_the_configuration(spec, message):
    with pytest.raises(ConfigError, match=message):
        check_mixer(spec, key="m")


def test_mistakes_that_the_mixer_shows():
    with pytest.raises(ConfigError, match=r"mixer.causal_paths: False is impossible, the mixer is always causal"):
        create_mixer("mamba", 8, order="column", causal_paths=False)
    with pytest.raises(ConfigError, match=r"mixer.causal_paths: True is impossible, the mixer cannot be causal"):
        create_mixer("fnet", 8, order="column", causal_paths=True)
    with pytest.raises(ConfigError, match="needs several paths"):
        create_mixer("mamba", 8, order="column", merge="gated")
    with pytest.raises(ConfigError, match="reads its tokens from first to last"):
        create_mixer("mamba", 8, order="bidirectional", causal=True)
    assert create_mixer("mamba", 8, order="raster", causal=True).streams
    assert not isinstance(create_mixer("mamba", 8, order=None, merge="mean"), Ordered)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "linear_attention"])
@pytest.mark.parametrize("order", ["bidirectional", [{"name": "atrous", "size": 2}, {"name": "atrous", "size": 3}]])
def test_separate_paths(name, order):
    """With equal mixers they are the shared one; each path has its own parameters, around shared projections."""
    x = tokens()
    shared, separate = build(name, order, merge="sum"), build(name, order, merge="sum", separate_paths=True)
    inner = shared.mixers[0].state_dict()
    projections = type(shared.mixers[0]).projections
    state = {f"mixers.{i}.{k}": v for i in range(2) for k, v in inner.items()}
    for ours, theirs in zip(("enter", "leave"), projections or (), strict=projections is not None):
        for key in [k for k in state if f".{theirs}." in k]:
            state[f"{ours}.{key.rsplit('.', 1)[1]}"] = state.pop(key)
    separate.load_state_dict(state)
    expected = shared(x)
    torch.testing.assert_close(separate(x), expected, rtol=1e-4, atol=1e-5)
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[0, 1:, 2:] = False
    torch.testing.assert_close(separate(x, mask=mask)[mask], shared(x, mask=mask)[mask], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for i in range(2):
            before = separate(x)
            for parameter in separate.mixers[i].parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(separate(x), before, atol=1e-4)
    separate.reset_parameters()
    assert {n for n, p in separate.named_parameters() if p.ndim <= 1} <= separate.no_weight_decay()


@pytest.mark.parametrize("merge", ["mean", "gated", "concat"])
def test_separate_paths_train_and_compile(merge):
    mixer, x = build("mamba", "cross_scan", merge=merge, separate_paths=True), tokens().requires_grad_()
    expected = mixer(x)
    expected.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), expected)
    half = mixer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)


def test_separate_paths_need_several():
    with pytest.raises(ConfigError, match=r"mixer.separate_paths: it needs several paths; the order 'column' has one"):
        create_mixer("mamba", 8, order="column", separate_paths=True)
    with pytest.raises(ConfigError, match=r"m.separate_paths: it has no effect without `order`"):
        check_mixer({"name": "mamba", "separate_paths": True}, key="m")

"""Token orders: permutations that come back, on odd, non-square and three-axis grids, and VMamba's four modes."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers.orders.orders import Order
from mixerzoo.tests.utils import load_golden, relative_error

GRIDS = [(7,), (1, 1), (5, 7), (8, 3), (6, 6), (2, 5, 3), (3, 4, 4)]
ORDERS = {
    "raster": "raster",
    "column": "column",
    "column_reversed": "column_reversed",
    "serpentine": "serpentine",
    "bidirectional": "bidirectional",
    "cross2d": "cross_scan",
    "unidi": {"name": "cross_scan", "mode": "unidi"},
    "bidi": {"name": "cross_scan", "mode": "bidi"},
    "rot90": {"name": "cross_scan", "mode": "rot90"},
    "window": {"name": "atrous", "size": 3},
    "atrous": {"name": "atrous", "size": 2, "rate": 2},
    "atrous_reversed": {"name": "atrous_reversed", "size": 3, "rate": 2},
    "atrous_joined": {"name": "atrous", "size": 2, "rate": 2, "joined": True},
    "rates": [{"name": "atrous", "size": 2, "rate": 1}, {"name": "atrous", "size": 2, "rate": 3}],
    "boxes": {"name": "window", "size": [2, 2, 3]},
    "boxes_moved": [
        {"name": "window", "size": [2, 3, 4], "shift": True},
        {"name": "window_reversed", "size": [2, 3, 4]},
    ],
    "hilbert": "hilbert",
    "random": {"name": "random", "seed": 3},
    "interleaved": "frame_interleaved",
    "interleaved_columns": {"name": "frame_interleaved", "columns": True},
    "interleaved_as_frames": {"name": "frame_interleaved", "columns": True, "as_frames": True},
    "rotary": "rotary_major",
    "list": ["raster", "serpentine_reversed", "hilbert", "cross_scan"],
}
CASES = [(o, g) for o in ORDERS for g in GRIDS if len(g) == 3 or not o.startswith("interleaved")]


def read(order: Order, grid: tuple[int, ...]) -> list[int]:
    """The numbers of the tokens in the order of its first sequence."""
    count = int(torch.tensor(grid).prod())
    return order.scan(torch.arange(count).view(1, *grid, 1).double())[0, 0, :, 0].int().tolist()


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_round_trip(name, grid):
    order = Order(ORDERS[name], layer_index=2)
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    sequences = order.scan(x)
    paths = order.paths
    assert torch.equal(order.unscan(sequences, grid), x.unsqueeze(1).expand(-1, paths, *x.shape[1:]))
    torch.testing.assert_close(order.merge(sequences, grid), paths * x)
    torch.testing.assert_close(order.merge(sequences, grid, "mean"), x)
    real = order.scan_mask(torch.ones(2, *grid, dtype=torch.bool))
    assert int(real.sum()) == 2 * paths * x[0, ..., 0].numel()
    assert bool((real[..., 1:] <= real[..., :-1]).all()), "padding comes last"
    assert bool((sequences[~real] == 0).all())


@pytest.mark.parametrize("name", ["cross2d", "atrous_reversed", "list", "raster", "rates"])
def test_gradients(name):
    order, grid = Order(ORDERS[name]), (3, 5)
    x = torch.randn(1, *grid, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.scan, x)
    assert torch.autograd.gradgradcheck(order.scan, x)
    y = torch.randn(*order.scan(x).shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: order.merge(y, grid), y)
    assert torch.autograd.gradgradcheck(lambda y: order.merge(y, grid, "mean"), y)


def test_what_is_read():
    grid = (3, 4)
    assert read(Order("column"), grid) == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert read(Order("raster_reversed"), grid) == list(range(11, -1, -1))
    assert read(Order("serpentine"), grid) == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert read(Order("serpentine"), (2, 2, 2)) == [0, 1, 3, 2, 6, 7, 5, 4]
    assert read(Order("frame_interleaved"), (2, 2, 2)) == [0, 4, 1, 5, 2, 6, 3, 7]
    boxes = {"name": "window", "size": [1, 2, 3]}
    assert read(Order(boxes, layer_index=2), (4, 4)) == [0, 1, 2, 4, 5, 6]
    moved = Order({**boxes, "shift": True}, layer_index=2)
    rows = [[0, 1, 0, 0], [2, 3, 0, 0], [4, 5, 8, 9], [6, 7, 10, 11], [12, 13, 0, 0], [14, 15, 0, 0]]
    assert moved.table((4, 4)).index.view(6, 4).tolist() == rows
    assert Order(boxes, layer_index=1).table((4, 4)).index.view(6, 4).tolist() == rows
    assert read(Order({"name": "frame_interleaved", "columns": True}), (2, 2, 2)) == [0, 4, 2, 6, 1, 5, 3, 7]
    turns = [read(Order("rotary_major", layer_index=i), (2, 2, 2)) for i in range(5)]
    assert turns[:4] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 2, 1, 3, 4, 6, 5, 7],
        [0, 4, 1, 5, 2, 6, 3, 7],
        [0, 4, 2, 6, 1, 5, 3, 7],
    ]
    assert turns[4] == turns[0]
    assert read(Order({"name": "rotary_major", "turn": 1}, layer_index=3), (2, 2, 2)) == turns[1]
    assert read(Order("random"), grid) != read(Order({"name": "random", "seed": 1}), grid)


def test_windows():
    x = torch.arange(16).view(1, 4, 4, 1).float()
    windows = Order({"name": "atrous", "size": 2}).scan(x)[0, ..., 0].int().tolist()
    assert windows == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    dilated = Order({"name": "atrous", "size": 2, "rate": 2}).scan(x)[0, ..., 0].int().tolist()
    assert dilated == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
    joined = Order({"name": "atrous", "size": 2, "joined": True}).scan(x)[0, ..., 0].int().tolist()
    assert joined == [[0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
    border = Order({"name": "atrous", "size": 2}).table((1, 3))
    assert border.valid is not None
    assert border.valid.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("grid", [(1, 9), (2, 2), (8, 8), (7, 5), (5, 9), (6, 10), (14, 13), (16, 3), (3, 4, 4)])
def test_hilbert_walks_to_neighbours(grid):
    places = torch.tensor(read(Order("hilbert"), grid))
    at = torch.stack(torch.unravel_index(places, grid), 1)
    steps = (at[1:] - at[:-1]).abs()
    assert int(steps.max()) == 1
    diagonal = int((steps.sum(1) > 1).sum())
    assert diagonal == 0 if all(s % 2 == 0 for s in grid[-2:]) else diagonal <= 2


@pytest.mark.parametrize("mode", ["cross2d", "unidi", "bidi", "rot90"])
def test_vmamba(mode):
    order = Order({"name": "cross_scan", "mode": mode})
    golden = load_golden(f"vmamba_cross_scan_{mode}")
    x = golden["input"].movedim(1, -1).clone().requires_grad_()
    y = order.scan(x).movedim(-1, 2)
    assert torch.equal(y, golden["output"])
    (grad,) = torch.autograd.grad((y * golden["cotangent"]).sum(), x)
    assert relative_error(grad.movedim(-1, 1), golden["grad.input"]) < 1e-6

    golden = load_golden(f"vmamba_cross_merge_{mode}")
    y = golden["input"].flatten(3).movedim(2, -1).clone().requires_grad_()
    merged = order.merge(y, golden["input"].shape[-2:]).flatten(1, 2).movedim(-1, 1)
    assert relative_error(merged, golden["output"]) < 1e-6
    (grad,) = torch.autograd.grad((merged * golden["cotangent"]).sum(), y)
    assert relative_error(grad.movedim(-1, 2).reshape_as(golden["input"]), golden["grad.input"]) < 1e-6


@pytest.mark.parametrize("name", ["cross2d", "rates", "list"])
def test_compiles_without_graph_break(name):
    order = Order(ORDERS[name])

    def both(x):
        return order.merge(order.scan(x * 2) ** 2, x.shape[1:-1])

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for grid in ((4, 6), (5, 3)):  # another grid, in the graph's second form with sizes left open
        x = torch.randn(2, *grid, 3, requires_grad=True)
        torch.testing.assert_close(compiled(x), both(x))
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(both(x).sum(), x)[0])


def test_a_table_made_in_inference_mode_trains():
    order = Order({"name": "random", "seed": 77})
    with torch.inference_mode():
        order.scan(torch.randn(1, 3, 3, 2))
    x = torch.randn(1, 3, 3, 2, requires_grad=True)
    order.merge(order.scan(x), (3, 3)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("crosscan", r'order: "crosscan" is not known. Did you mean "cross_scan"\?'),
        ({"name": "atrous", "rat": 2}, r'order.rat: order "atrous" has no such option. Did you mean "rate"\?'),
        (["raster", {"name": "atrous", "size": "3"}], r"order\[1\].size: '3' is not of type int"),
        ({"name": "cross_scan", "mode": "diagonal"}, "order.mode: 'diagonal' is not of type"),
        ([], "empty"),
        (None, "neither the name"),
    ],
)
def test_mistakes_in_the_configuration(spec, message):
    with pytest.raises(ConfigError, match=message):
        Order(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "atrous", "size": 0}, "order.size: 0"),
        ({"name": "atrous", "rate": -1}, "order.rate: -1"),
        ({"name": "rotary_major", "turn": 4}, "order.turn: 4"),
        ("frame_interleaved", "grids with 3 axes, not for 6x4"),
        (["raster", {"name": "atrous", "size": 2}], "mostly padding"),
    ],
)
def test_mistakes_that_the_grid_shows(spec, message):
    with pytest.raises(ConfigError, match=message):
        Order(spec).scan(torch.randn(1, 6, 4, 2))

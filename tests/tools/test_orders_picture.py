"""What the picture of receptive fields is drawn from."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.tools.orders_picture import receptive_field

GRID = (5, 7)


def seen(order, grid=GRID, **options):
    return receptive_field(order, grid, seeds=1, **options) > 0


def test_raster_sees_what_came_before():
    place = torch.arange(35).view(GRID)
    assert torch.equal(seen("raster"), place <= 17)
    assert torch.equal(seen("raster_reversed"), place >= 17)
    assert seen("bidirectional").all()
    assert seen("cross_scan").all()


@pytest.mark.parametrize("rate", [1, 2])
def test_windows_see_themselves(rate):
    order = [{"name": name, "size": 3, "rate": rate} for name in ("atrous", "atrous_reversed")]
    i, j = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    block = (i // (3 * rate) == 2 // (3 * rate)) & (j // (3 * rate) == 3 // (3 * rate))
    expected = block & (i % rate == 2 % rate) & (j % rate == 3 % rate)
    assert torch.equal(seen(order), expected)


def test_mate_sees_all_from_every_layer():
    assert seen(None, (3, 4, 5), mixer="mate").all()

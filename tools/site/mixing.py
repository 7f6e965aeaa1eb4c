"""What a part mixes, as a picture: how strongly the output of one token depends on every input token.

The strength is the norm of the gradient of the output along random directions, averaged over samples and directions,
relative to the largest. Grey inputs have none, or less than rounding can tell from none.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...mixers import Grid
from ...mixers.registry import mixer_class
from ...models import create_model
from ...tasks import create_task
from .growth import build

DIM, TOKENS, PLANE, CLIP = 32, 64, (8, 8), (4, 7, 7)
STEPS, BATCH = 80, 64
Panel = tuple[str, Tensor, tuple[int, int] | None]  # title, strengths, place of the output
LOWEST, NONE = 1e-3, 1e-6  # of the largest strength: the end of the colours, and what an FFT leaves of zero


def strengths(mixer: nn.Module, x: Tensor, place: tuple[int, ...], *, directions: int = 4) -> Tensor:
    """How strongly the output at `place` depends on every token of `x` `(B, *grid, C)`, on the grid."""
    x = x.detach().clone().requires_grad_()
    y = mixer(x)[(slice(None), *place)]
    total = torch.zeros(x.shape[1:-1])
    for seed in range(directions):
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        (grad,) = torch.autograd.grad((y * along).sum(), x, retain_graph=True)
        total += grad.norm(dim=-1).mean(0)
    return total / directions


def matrix(mixer: nn.Module, x: Tensor) -> Tensor:
    """The same for every output token of a sequence `(1, N, C)`: rows are outputs, columns inputs."""
    n = x.shape[1]
    x = x.detach().expand(n, -1, -1).clone().requires_grad_()
    y = mixer(x)[torch.arange(n), torch.arange(n)]  # of copy i the output of token i
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((y * along).sum(), x)
    return grad.norm(dim=-1)


def trained_on_digits(name: str, *, steps: int = STEPS) -> tuple[Tensor, Tensor, float]:
    """The first mixer of a small pyramid on images of digits, before and after a short training.

    Returns:
        strengths on the 8x8 tokens before, those after, and the accuracy on the test split.
    """
    torch.manual_seed(0)
    images, labels, test_images, test_labels = _digits()
    model = create_model("metaformer_digits", mixer=name)
    first = next(module for module in model.modules() if type(module) is mixer_class(name))
    seen: dict[str, Tensor] = {}

    def look() -> Tensor:
        hook = first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
        model.eval()
        with torch.no_grad():
            model(test_images[:16])
        hook.remove()
        return strengths(first, seen["x"], tuple(side // 2 for side in PLANE))

    before = look()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after = look()
    with torch.no_grad():
        right = (model(test_images).argmax(-1) == test_labels).float().mean()
    return before, after, float(right)


@functools.cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, and for testing."""
    task = create_task("digits")
    task.open()
    found: list[Tensor] = []
    for split in ("train", "test"):
        index = torch.arange(task.size(split))
        batch = task.fetch(split, index, train=False, generator=torch.Generator())
        found += [batch["input"], batch["target"]]
    return found[0], found[1], found[2], found[3]


# -- pictures


def _show(axes: Any, field: Tensor, title: str, cross: tuple[int, int] | None, top: float) -> None:
    values = field.double().masked_fill(field <= NONE * top, float("nan")).numpy()
    axes.set_facecolor("#c9c9c9")
    axes.imshow(values, norm=LogNorm(LOWEST * top, top, clip=True), cmap="viridis")
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])
    if cross is not None:
        axes.plot(cross[1], cross[0], "r+", markersize=9)


def draw(panels: list[Panel], *, together: bool = False) -> bytes:
    """A row of panels as PNG, each with colours of its own, or together, as frames of one clip."""
    top = max(float(field.max()) for _, field, _ in panels)
    figure = Figure(figsize=(2.35 * len(panels), 2.65), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    row: Any = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, field, cross) in zip(row[0], panels, strict=True):
        _show(axes, field, title, cross, max(top if together else float(field.max()), 1e-12))
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def on_grid(mixer: nn.Module, grid: Grid, *, dim: int = DIM) -> Tensor:
    """Strengths of the centre token on random tokens."""
    torch.manual_seed(0)
    return strengths(mixer, torch.randn(4, *grid, dim), tuple(side // 2 for side in grid))


def picture_of_mixer(name: str, *, train: bool = True) -> tuple[bytes, str]:
    """The picture of a token mixer, and what it shows.

    Args:
        name: of the mixer, which has its default options.
        train: also show it after a short training, where it takes images.
    """
    cls = mixer_class(name)
    panels: list[Panel] = []
    notes = []
    middle = (PLANE[0] // 2, PLANE[1] // 2)
    torch.manual_seed(0)
    if 2 in cls.axes and train:
        before, after, accuracy = trained_on_digits(name)
        panels += [("8x8 digits, untrained", before, middle), (f"after {STEPS} steps", after, middle)]
        notes.append(
            f"The first two: how strongly the output of one token (cross) depends on each of 8x8 tokens of images of "
            f"digits, in the first block of `metaformer_digits`, before and after {STEPS} steps of training "
            f"({accuracy:.0%} right on the test images; digits is too small to rank mixers)."
        )
    elif 2 in cls.axes:
        panels.append(("8x8 tokens, untrained", on_grid(build(name, PLANE, DIM), PLANE), middle))
        notes.append("How strongly the output of one token (cross) depends on each of 8x8 random tokens.")
    if 1 in cls.axes:
        mixer = build(name, (TOKENS,), DIM)
        panels.append((f"sequence of {TOKENS}, untrained", matrix(mixer, torch.randn(1, TOKENS, DIM)), None))
        form = "causal form, " if mixer.is_causal or cls.causal == "always" else ""
        notes.append(
            f"The last: a sequence of {TOKENS} random tokens ({form}untrained): row i is the output of token i."
        )
    if cls.axes == (3,):
        field = on_grid(build(name, CLIP, DIM), CLIP)
        panels += [(f"frame {t}", field[t], (3, 3) if t == CLIP[0] // 2 else None) for t in range(CLIP[0])]
        notes.append("How strongly the output of one token (cross) depends on those of four frames, untrained.")
    notes.append("Bright is strong, on a logarithmic scale over three decades; grey is none (less than a millionth).")
    return draw(panels, together=cls.axes == (3,)), " ".join(notes)


def of_channels(part: nn.Module, grid: Grid, *, dim: int = DIM) -> Tensor:
    """How strongly every output channel of the centre token (rows) depends on its input channels (columns)."""
    torch.manual_seed(0)
    x = torch.randn(1, *grid, dim, requires_grad=True)
    centre = (0, *(side // 2 for side in grid))
    y = part(x)[centre]
    return torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0][centre].abs() for one in y])


def picture_of_channel_mixer(part: nn.Module, grid: Grid, *, mixes_tokens: bool) -> tuple[bytes, str]:
    """The picture of a channel mixer on a grid of random tokens, and what it shows."""
    panels: list[Panel] = [(f"{DIM} channels, untrained", of_channels(part, grid), None)]
    text = "How strongly the output channels of a token (rows) depend on its input channels (columns)."
    if mixes_tokens:
        panels.append(("8x8 tokens, untrained", on_grid(part, grid), (grid[0] // 2, grid[1] // 2)))
        text += " Right: how strongly the output of one token (cross) depends on each of 8x8 tokens."
    return draw(panels), text

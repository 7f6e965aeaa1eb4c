"""What a whole model mixes, untrained, as a picture: which inputs the output of one token depends on.

Axis letters: B batch, N tokens, C channels, H height, W width, T frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import create_model
from .mixing import TOKENS, Panel, draw

FINEST = 56  # points of a side in the picture of an image


def picture_of_model(name: str, config: Mapping[str, Any]) -> tuple[bytes, str]:
    """The picture of a model with random initial values, and what it shows.

    Args:
        name: of the model.
        config: its configuration.
    """
    torch.manual_seed(0)
    model = create_model(name).eval()
    if "vocab_size" in config:
        text = (
            f"Row i is the output of token i of {TOKENS} random ones in `{name}`, by the embeddings that it depends on"
        )
        field = _of_sequence(model, int(config["vocab_size"]))
        return draw([(f"{TOKENS} tokens, untrained", field, None)]), _note(text)
    size = config.get("image_size") or 224
    sides = (size, size) if isinstance(size, int) else tuple(size)
    frames = (int(config["frames"]),) if config.get("frames") else ()
    field = _of_images(model, torch.randn(1, int(config.get("in_chans", 3)), *frames, *sides))
    shown = field if frames else field[None]
    coarse = F.adaptive_avg_pool2d(shown[:, None], (min(FINEST, sides[0]), min(FINEST, sides[1])))[:, 0]
    panels: list[Panel] = [
        (f"frame {t}" if frames else f"{sides[0]}x{sides[1]}, untrained", one, None) for t, one in enumerate(coarse)
    ]
    where = "of the middle frame " if frames else ""
    text = f"How strongly the token in the middle {where}of the last map of `{name}` depends on every pixel"
    return draw(panels, together=True), _note(text)


def _note(text: str) -> str:
    return (
        f"{text}, at random initial values. Bright is strong, on a logarithmic scale over three decades; grey is none."
    )


def _of_images(model: Any, images: Tensor) -> Tensor:
    """Strengths `(H, W)` or `(T, H, W)` of the middle token of the last map."""
    images.requires_grad_()
    features = model.forward_features(images)
    if features.ndim == 3:  # a square of tokens, with a class token before all of them or in the middle
        tokens = features.shape[1]
        features = features[:, tokens // 2 + math.isqrt(tokens - 1) // 2 + 1]
    else:  # a map of channels first
        for axis in reversed(range(2, features.ndim)):
            features = features.select(axis, features.shape[axis] // 2)
    along = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((features * along).sum(), images)
    return grad[0].norm(dim=0)


def _of_sequence(model: Any, vocabulary: int) -> Tensor:
    """Strengths `(N, N)` of the outputs (rows) by the inputs of the first block."""
    ids = torch.randint(min(vocabulary, 256), (1, TOKENS)).expand(TOKENS, -1)
    leaf: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaf.append(args[0].detach().clone().requires_grad_())
        return (leaf[0], *args[1:])

    hook = model.blocks[0].register_forward_pre_hook(take)
    features = model.forward_features(ids)[torch.arange(TOKENS), torch.arange(TOKENS)]
    hook.remove()
    along = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((features * along).sum(), leaf[0])
    return grad.norm(dim=-1)

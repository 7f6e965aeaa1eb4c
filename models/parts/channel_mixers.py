"""Channel mixers: what a block applies to every token, most of them to each on its own.

Axis letters: B batch, C channels, E hidden channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...mixers.part import Part
from ...schema import Parts, Positive, Probability, Size
from .norms import ACTIVATIONS

CHANNEL_MIXERS = Parts("channel mixer", __name__)


class ChannelMixer(nn.Module, Part):
    """Base of channel mixers: `forward(x, *, mask=None, document_ids=None)`, `(B, *grid, C)` to the same shape.

    One that treats every token alone takes both and looks at neither; it also takes a single token, `(B, C)`. One that
    mixes tokens states it, and honours or refuses them.
    """

    def refuse_padding(self, mask: Tensor | None, document_ids: Tensor | None) -> None:
        """Raise when a mask or document ids are given to a part that mixes tokens and cannot honour them."""
        for name, given, honoured in (("mask", mask, self.masks), ("document_ids", document_ids, self.packs)):
            if given is not None and not honoured:
                raise ConfigError(f"{name}: the channel mixer {type(self).__name__} mixes tokens and cannot honour it.")


def hidden_width(dim: int, ratio: float, hidden: int | None, multiple_of: int = 1) -> int:
    """Hidden channels E: `hidden` if given, else `ratio * dim`, rounded up to a multiple."""
    width = hidden if hidden is not None else int(ratio * dim)
    return -(-width // multiple_of) * multiple_of


@CHANNEL_MIXERS.register("mlp")
class Mlp(ChannelMixer):
    """Two linear layers with an activation between them, `(B, *grid, C)` to the same shape.

    Args:
        dim: channels C.
        ratio: hidden channels E as a multiple of C.
        hidden: hidden channels E, in place of `ratio`.
        act: activation by name, see `norms.ACTIVATIONS`.
        bias: biases in both layers.
        dropout: probability, after the activation and after the second layer.
    """

    source = "Attention Is All You Need (2017), arXiv:1706.03762"
    equation = "y = W2 act(W1 x + b1) + b2"
    alternatives = {"ratio": 2.0, "hidden": 24, "act": "relu", "dropout": 0.5}

    def __init__(
        self,
        dim: int,
        *,
        ratio: Positive = 4.0,
        hidden: Size | None = None,
        act: str = "gelu",
        bias: bool = True,
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__()
        width = hidden_width(dim, ratio, hidden)
        self.fc1 = nn.Linear(dim, width, bias=bias)
        self.act = ACTIVATIONS.build(act, key="act")
        self.fc2 = nn.Linear(width, dim, bias=bias)
        self.dropout = dropout

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        hidden = self.act(self.fc1(x))
        if self.dropout and self.training:
            return F.dropout(self.fc2(F.dropout(hidden, self.dropout)), self.dropout)
        return self.fc2(hidden)


@CHANNEL_MIXERS.register("gated_mlp")
class GatedMlp(ChannelMixer):
    """Gated linear unit: `W2 (act(Wg x) * (Wu x))`. Shazeer (2020), arXiv:2002.05202.

    `fc1` holds the rows of the gate first, then those of the value.

    Args:
        dim: channels C.
        ratio: hidden channels E as a multiple of C; 8/3 has the parameters of an MLP with ratio 4.
        hidden: hidden channels E, in place of `ratio`.
        multiple_of: E is rounded up to a multiple of this.
        act: activation of the gate by name.
        bias: biases in both layers.
    """

    source = "GLU Variants Improve Transformer (2020), arXiv:2002.05202"
    equation = "y = W2 (act(Wg x) * (Wu x))"
    alternatives = {"ratio": 2.0, "hidden": 24, "multiple_of": 64, "act": "gelu"}

    def __init__(
        self,
        dim: int,
        *,
        ratio: Positive = 8 / 3,
        hidden: Size | None = None,
        multiple_of: Size = 8,
        act: str = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        width = hidden_width(dim, ratio, hidden, multiple_of)
        self.fc1 = nn.Linear(dim, 2 * width, bias=bias)
        self.act = ACTIVATIONS.build(act, key="act")
        self.fc2 = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(gate) * value)

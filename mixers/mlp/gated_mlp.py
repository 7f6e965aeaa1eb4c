"""Gates made by token mixing: gMLP and NiNformer.

Axis letters: B batch, N tokens of the grid (the largest length, where causal), L tokens of the input, C channels,
D mixed channels, E hidden width over tokens, H heads. `*grid` is (N,), (H, W) or (T, H, W), flattened in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError, unknown
from ...schema import Positive, Size
from ..base import Grid
from .grid_mixing import ACTIVATIONS, MatrixMixer, PositionMixer, renamed
from .mlp import MlpMixer


class GMlp(MatrixMixer, name="gmlp"):
    """A channel MLP gated by a linear layer along the tokens. Liu et al. (2021), arXiv:2105.08050.

    `y = W2 (u * (S norm(v) + b))`, `[u, v] = act(W1 x)`. It mixes channels, too, so that the block around it needs no
    channel mixer. S starts near zero and b at one: at first the gate is open everywhere. The causal form, ours, makes S
    lower triangular.

    Args:
        dim: channels C.
        grid: the token grid, or the largest length where causal.
        causal: see above.
        ratio: width of `[u, v]` as a multiple of C; half of it is mixed.
        activation: "gelu", "relu" or "silu".
    """

    source = "Pay Attention to MLPs (2021), arXiv:2105.08050"
    formerly: ClassVar = {"weight": "proj.weight", "bias": "proj.bias"}
    equation = "y = W2 (u * (S norm(v) + b)), [u, v] = act(W1 x)"
    alternatives = {"ratio": 6.0, "activation": "relu"}

    def __init__(
        self, dim: int, *, grid: Grid, causal: bool = False, ratio: Positive = 4.0, activation: str = "gelu"
    ) -> None:
        super().__init__(dim, grid=grid, causal=causal)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        hidden = int(ratio * dim)
        if hidden < 2 or hidden % 2:
            raise OptionError("ratio", f"{ratio} gives {hidden} channels of {dim}; it must be an even number.")
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden // 2, eps=1e-5)
        self.allocate_matrix()
        self.fc2 = nn.Linear(hidden // 2, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        self.norm.reset_parameters()
        self.reset_positions()

    def reset_positions(self) -> None:
        nn.init.normal_(self.holder.weight, std=1e-6)
        nn.init.ones_(self.holder.bias)

    def mixed_width(self) -> int:
        return self.norm.normalized_shape[0]

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = ACTIVATIONS[self.activation](self.fc1(x)).chunk(2, dim=-1)
        return self.norm(v), u

    def after(self, mixed: Tensor, waiting: Any) -> Tensor:
        return self.fc2(mixed * waiting)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's `mlp_channels` of a block."""
        names = {"gate.norm.": "norm.", "gate.proj.": "proj.", "fc1.": "fc1.", "fc2.": "fc2."}
        return renamed(state_dict, {f"mlp_channels.{theirs}": ours for theirs, ours in names.items()})

    def extra_repr(self) -> str:
        return f"grid={self.grid}, causal={self.is_causal}"


class NiNformer(PositionMixer, name="ninformer"):
    """A linear layer gated by an MLP-Mixer block of its own: `(W x + b) * M(x)`. NiNformer (2024), arXiv:2403.02411.

    M is `x <- x + tokens(norm(x)); x <- x + channels(norm(x))`, both MLPs with GELU. Nothing bounds the gate. There is
    no causal form. The published models train with dropout in all MLPs; this one has none.

    Args:
        dim: channels C.
        grid: the token grid.
        token_hidden: hidden width over tokens; None for twice the channels, as published.
        channel_hidden: hidden width over channels; None for twice the channels.
    """

    causal = "cannot"
    packs = False
    streams = False
    complexity = "N"
    source = "NiNformer: A Network in Network Transformer with Token Mixing (2024), arXiv:2403.02411"
    equation = "y = (W x + b) * M(x), M: an MLP-Mixer block"
    alternatives = {"token_hidden": 20, "channel_hidden": 40}

    def __init__(
        self, dim: int, *, grid: Grid, token_hidden: Size | None = None, channel_hidden: Size | None = None
    ) -> None:
        super().__init__(dim, grid=grid, causal=False)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixer = MlpMixer(dim, grid=grid, token_hidden=token_hidden or 2 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, channel_hidden or 2 * dim)
        self.fc2 = nn.Linear(self.fc1.out_features, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As PyTorch has them, as published: in the token mixer, too."""
        tokens = (self.token_mixer.fc1, self.token_mixer.fc2)
        for layer in (self.proj, self.norm1, self.norm2, self.fc1, self.fc2, *tokens):
            layer.reset_parameters()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask=mask)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm1(x), x

    def mix(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.token_mixer(v.unflatten(1, self.token_mixer.grid or (-1,))).flatten(1, -2)

    def after(self, mixed: Tensor, waiting: Any) -> Tensor:
        hidden = waiting + mixed
        hidden = hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))
        return self.proj(waiting) * hidden

    def resize_grid(self, grid: Grid) -> None:
        self.grid = tuple(grid)
        self.token_mixer.resize_grid(grid)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official `MixerGatingUnit`."""
        names = {"proj.": "proj."}
        names |= {"Mixer.token_mix.2.net.0.": "token_mixer.fc1.", "Mixer.token_mix.2.net.3.": "token_mixer.fc2."}
        names |= {"Mixer.token_mix.0.": "norm1.", "Mixer.channel_mix.0.": "norm2."}
        names |= {"Mixer.channel_mix.1.net.0.": "fc1.", "Mixer.channel_mix.1.net.3.": "fc2."}
        return renamed(state_dict, names)

"""Token mixing by learned matrices over the positions: MLP-Mixer, ResMLP, dense.

Axis letters: B batch, N tokens of the grid (the largest length, where causal), L tokens of the input, C channels,
D mixed channels, E hidden width over tokens, H heads. `*grid` is (N,), (H, W) or (T, H, W), flattened in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import OptionError, unknown
from ...kernels import token_mlp
from ...schema import Positive, Size
from ..base import Grid
from ..resize import resize_tokens_weight
from .grid_mixing import ACTIVATIONS, MatrixMixer, PositionMixer, renamed


class Dense(MatrixMixer, name="dense"):
    """A full learned mixing matrix, the same for all inputs, `y_m = sum_n A_mn x_n`. JustDense, arXiv:2508.09153.

    The plainest of learned mixers, put in place of any other to see what that one is worth.

    Args:
        dim: channels C.
        grid: the token grid, or the largest length where causal.
        causal: A is lower triangular.
        num_heads: matrices, each for an equal share of the channels.
        softmax: the rows of A are softmaxes of the weights, so that tokens are averaged, not just summed; there is then
            no bias.
    """

    source = "JustDense: Just using Dense instead of Sequence Mixer (2025), arXiv:2508.09153"
    equation = "y_m = sum_n A_mn x_n"
    alternatives = {"num_heads": 2}

    def __init__(
        self, dim: int, *, grid: Grid, causal: bool = False, num_heads: Size = 1, softmax: bool = False
    ) -> None:
        super().__init__(dim, grid=grid, causal=causal)
        if dim % num_heads:
            raise OptionError("num_heads", f"{num_heads} does not divide the {dim} channels.")
        self.softmax = softmax
        self.weight = nn.Parameter(torch.empty(num_heads, self.tokens, self.tokens))
        self.bias = None if softmax else nn.Parameter(torch.empty(self.tokens))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reset_positions()

    def reset_positions(self) -> None:
        """Linear layers: uniform within 1/sqrt(N). With softmax: nearly an average over the tokens."""
        bound = self.tokens**-0.5
        if self.bias is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    def matrix(self) -> Tensor:
        if not self.softmax:
            return super().matrix()
        logits = self.weight.float()
        if self.is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
        return logits.softmax(-1).to(self.weight.dtype)

    def mix(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mixed = super().mix(v)
        if mask is None or not self.softmax:
            return mixed
        # averages over the real tokens: divided by the weight that fell on them
        weight = super().mix(mask.to(v.dtype).unsqueeze(-1).expand(v.shape))
        return mixed / weight.clamp_min(torch.finfo(v.dtype).tiny)

    def summed_axes(self) -> list[int]:
        return [] if self.softmax else [-1]  # a softmax sums to one by itself

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.weight.shape[0]}, softmax={self.softmax}, causal={self.is_causal}"


class ResMlp(MatrixMixer, name="resmlp"):
    """One linear layer over the tokens, `y = W x + b`, shared by the channels. ResMLP (2021), arXiv:2105.03404.

    The block around it has affine maps in place of norms and layer scale. The causal form, ours, makes W lower
    triangular.

    Args:
        dim: channels C.
        grid: the token grid, or the largest length where causal.
        causal: see above.
    """

    source = "ResMLP: Feedforward networks for image classification (2021), arXiv:2105.03404"
    formerly: ClassVar = {"weight": "proj.weight", "bias": "proj.bias"}
    equation = "y = W x + b, along the tokens"

    def __init__(self, dim: int, *, grid: Grid, causal: bool = False) -> None:
        super().__init__(dim, grid=grid, causal=causal)
        self.allocate_matrix()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reset_positions()

    def reset_positions(self) -> None:
        nn.init.xavier_uniform_(self.holder.weight)
        nn.init.zeros_(self.holder.bias)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's `linear_tokens` of a block; the official code holds the matrix as `attn`."""
        prefix = "attn" if "attn.weight" in state_dict else "linear_tokens"
        return {f"proj.{name}": state_dict[f"{prefix}.{name}"] for name in ("weight", "bias")}

    def extra_repr(self) -> str:
        return f"grid={self.grid}, causal={self.is_causal}"


class MlpMixer(PositionMixer, name="mlp_mixer"):
    """An MLP over the tokens, shared by the channels: `y = W2 act(W1 x + b1) + b2`. MLP-Mixer (2021), arXiv:2105.01601.

    The hidden width comes from the channels, not from the tokens, so that time is linear in N. Both layers are linear
    layers of PyTorch's on the transposed tokens.

    The causal form, ours: there are k hidden units for every position, E = k N with the smallest k that reaches the
    hidden width asked for. The units of position n see tokens up to n (rows of W1), and the output at position m sees
    units of positions up to m (rows of W2). So output m depends on tokens up to m, exactly, and a sequence of L tokens
    uses the first L positions and k L units. Time is then N^2. Its masked weights are the mixer's own, since an adapter
    of a linear layer would show the future, and `kernels.token_mlp` applies them.

    Args:
        dim: channels C.
        grid: the token grid, or the largest length where causal.
        causal: see above.
        token_ratio: hidden width E as a multiple of the channels.
        token_hidden: hidden width E, in place of `token_ratio`.
        activation: "gelu", "relu" or "silu".
    """

    complexity = "N"
    source = "MLP-Mixer: An all-MLP Architecture for Vision (2021), arXiv:2105.01601"
    equation = "y = W2 act(W1 x + b1) + b2, along the tokens"
    alternatives = {"token_ratio": 1.0, "token_hidden": 40, "activation": "relu"}
    formerly: ClassVar = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid,
        causal: bool = False,
        token_ratio: Positive = 0.5,
        token_hidden: Size | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__(dim, grid=grid, causal=causal)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        hidden = int(token_ratio * dim) if token_hidden is None else token_hidden
        if hidden < 1:
            raise OptionError("token_ratio", f"{token_ratio} of {dim} channels leaves no hidden units.")
        self.activation = activation
        self.per_token = ceil(hidden / self.tokens) if causal else 0
        if causal:
            self._allocate(self.per_token * self.tokens, None, None)
        else:
            self.fc1, self.fc2 = nn.Linear(self.tokens, hidden), nn.Linear(hidden, self.tokens)
        self.reset_parameters()

    def _allocate(self, hidden: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(hidden, self.tokens, **make))
        self.b1 = nn.Parameter(torch.empty(hidden, **make))
        self.w2 = nn.Parameter(torch.empty(self.tokens, hidden, **make))
        self.b2 = nn.Parameter(torch.empty(self.tokens, **make))

    def reset_parameters(self) -> None:
        for value in self.parameters():
            if value.ndim > 1:
                nn.init.xavier_uniform_(value)
            else:
                nn.init.normal_(value, std=1e-6)

    def weights(self) -> tuple[Tensor, Tensor]:
        """W1 and W2 of the causal form as they are applied: without what would reach from the future into the past."""
        position = torch.arange(self.tokens, device=self.w1.device)
        unit = position.repeat_interleave(self.per_token)  # the position of each hidden unit
        return self.w1 * (position <= unit.unsqueeze(1)), self.w2 * (unit <= position.unsqueeze(1))

    def mix(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.is_causal:
            return self.fc2(ACTIVATIONS[self.activation](self.fc1(v.transpose(1, 2)))).transpose(1, 2)
        length = v.shape[1]
        w1, w2 = self.weights()
        hidden = length * self.per_token
        return token_mlp(
            v,
            w1[:hidden, :length],
            self.b1[:hidden],
            w2[:length, :hidden],
            self.b2[:length],
            activation=self.activation,
        )

    def cached(self, past: Tensor) -> Tensor:
        """The hidden units `(B, E, C)`; those of positions without a token yet are written before they are read."""
        return ACTIVATIONS[self.activation](torch.matmul(self.weights()[0], past) + self.b1.unsqueeze(-1))

    def mix_one(self, past: Tensor, cache: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        w1, w2 = self.weights()
        units = count.unsqueeze(1) * self.per_token + torch.arange(self.per_token, device=past.device)  # (B, k)
        new = ACTIVATIONS[self.activation](torch.matmul(w1[units], past) + self.b1[units].unsqueeze(-1))
        cache = cache.scatter(1, units.unsqueeze(-1).expand_as(new), new)
        mixed = torch.matmul(w2[count].unsqueeze(1), cache).squeeze(1)
        return mixed + self.b2[count].unsqueeze(-1), cache

    def resize_grid(self, grid: Grid) -> None:
        """Other positions in place. The causal form keeps its first positions and starts new ones afresh."""
        if tuple(grid) == self.grid:
            return
        old, self.grid = self.grid or (), tuple(grid)
        if self.is_causal:
            before = self.w1.detach(), self.b1.detach(), self.w2.detach(), self.b2.detach()
            self._allocate(self.tokens * self.per_token, self.w1.device, self.w1.dtype)
            self.reset_parameters()
            with torch.no_grad():
                for new, kept in zip((self.w1, self.b1, self.w2, self.b2), before, strict=True):
                    part = tuple(slice(min(a, b)) for a, b in zip(new.shape, kept.shape, strict=True))
                    new[part] = kept[part]
            return
        first, last = self.fc1, self.fc2
        first.weight = nn.Parameter(resize_tokens_weight(first.weight.detach(), old, self.grid, [1], summed=[1]))
        last.weight = nn.Parameter(resize_tokens_weight(last.weight.detach(), old, self.grid, [0]))
        last.bias = nn.Parameter(resize_tokens_weight(last.bias.detach(), old, self.grid, [0]))
        first.in_features = last.out_features = self.tokens

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's `mlp_tokens` of a block."""
        return renamed(state_dict, {"mlp_tokens.": ""})

    def extra_repr(self) -> str:
        hidden = self.w1.shape[0] if self.is_causal else self.fc1.out_features
        return f"grid={self.grid}, token_hidden={hidden}, causal={self.is_causal}"

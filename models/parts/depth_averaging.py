"""The parts of MambaMixer that are not token mixers: selection across channels, and averages of earlier layers.

Axis letters: B batch, C channels, W channels of a group, L layers; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers import create_mixer
from ...schema import Size
from .channel_mixers import CHANNEL_MIXERS, ChannelMixer


@CHANNEL_MIXERS.register("selective_channel")
class SelectiveChannelMixer(ChannelMixer):
    """A bidirectional selective state-space model along the channels of a token. MambaMixer (2024), arXiv:2403.19888.

    The C channels of a token are read as a sequence of C / W groups of W channels, by `mamba` forwards and backwards,
    each way with a convolution and a scan of its own between shared projections and gate; both are added. Every token
    is treated alone and alike, so that it fits any grid, causal models too. In the paper the linear layers before the
    scan run along the tokens and so are made for one grid; where its text leaves sizes open they are ours.

    Maps `(B, *grid, C)` to the same shape.

    Args:
        dim: channels C.
        width: channels W of a group; it divides C.
        d_state: states of each inner channel.
        d_conv: taps of the convolution along the groups.
        expand: inner channels per channel.

    Raises:
        ConfigError: a width that does not divide the channels.
    """

    source = "MambaMixer (2024), arXiv:2403.19888"
    equation = "y = mamba(x) + reverse(mamba'(reverse(x))), along the groups of channels of every token"
    alternatives = {"width": 8, "d_state": 4, "d_conv": 2, "expand": 1}

    def __init__(self, dim: int, *, width: Size = 16, d_state: Size = 16, d_conv: Size = 4, expand: Size = 2) -> None:
        super().__init__()
        if dim % width:
            raise OptionError("width", f"{width} does not divide the {dim} channels.")
        self.width = width
        self.mixer = create_mixer(
            "mamba",
            width,
            order="bidirectional",
            merge="sum",
            separate_paths=True,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            key="",
        )

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return self.mixer(x.reshape(-1, x.shape[-1] // self.width, self.width)).reshape(x.shape)


class DepthAverage(nn.Module):
    """The input of every layer as a learned weighted sum of the outputs of all layers before it.

    MambaMixer (2024), arXiv:2403.19888, and DenseFormer (2024), arXiv:2402.02622: here the outputs are those of the
    residual stream, and the weights start with 1 for the last and 0 for the others, so that a model starts as it would
    without them. A layer is half of a block where that has `halves`: its token mixing, and its channel mixing.

    Args:
        layers: L, layers that are averaged behind.
        before: outputs that exist before the first of them.
    """

    def __init__(self, layers: int, *, before: int = 1) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(before + i + 1) for i in range(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing but the last output."""
        for weight in self.weights:
            nn.init.zeros_(weight)
            nn.init.ones_(weight[-1:])

    def forward(
        self,
        layers: Sequence[Callable[..., Tensor]],
        x: Tensor,
        outputs: list[Tensor],
        run: Callable[[Callable[..., Tensor], Tensor], Tensor],
    ) -> Tensor:
        """Tokens `(B, *grid, C)` through the layers.

        Args:
            layers: as of `layers_of`.
            x: input of the first of them.
            outputs: what came before, the oldest first; the layers' outputs are added to it.
            run: applies a layer, with recomputation or without.

        Returns:
            The average behind the last layer.
        """
        for weight, layer in zip(self.weights, layers, strict=True):
            outputs.append(run(layer, x))
            shares = weight.to(x.dtype)
            x = shares[len(outputs) - 1] * outputs[-1]
            for i, output in enumerate(outputs[:-1]):
                x = torch.addcmul(x, output, shares[i])
        return x


def layers_of(blocks: Iterable[nn.Module]) -> list[Callable[..., Tensor]]:
    """What counts as a layer in blocks: their halves, or themselves."""
    return [half for block in blocks for half in getattr(block, "halves", lambda b=block: [b])()]

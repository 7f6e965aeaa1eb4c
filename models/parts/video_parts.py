"""What models of video put around their token mixers.

Axis letters: B batch, T frames, H height, W width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError, OptionError
from ...mixers.layers import OneNode
from ...schema import Size
from .channel_mixers import CHANNEL_MIXERS, ChannelMixer


@CHANNEL_MIXERS.register("channel_attention_conv")
class ChannelAttentionConv(OneNode, ChannelMixer):
    """`u * sigmoid(fc2(relu(fc1(mean(u)))))` with `u = conv3x3(gelu(conv3x3(x)))`, in each frame for itself.

    The second half of VFIMamba's mixed-SSM block (2024), arXiv:2407.02315, from MambaIR (2024), arXiv:2402.15648: the
    convolutions give what the scan forgets of the neighbourhood, the channel attention (2018), arXiv:1807.02758, keeps
    channels from repeating each other. It looks at neighbours, so it takes images or clips and no padding.

    Args:
        dim: channels C.
        compress: C over the channels between the convolutions.
        squeeze: C over the hidden channels of the attention.

    Shapes: `(B, H, W, C)` or `(B, T, H, W, C)`, and the same out.

    Raises:
        ConfigError: a ratio that leaves no channel.
    """

    axes = (2, 3)
    mixes_tokens = True
    source = "VFIMamba (2024), arXiv:2407.02315"
    equation = "y = u * sigmoid(W2 relu(W1 mean(u))), u = conv3x3(gelu(conv3x3(x)))"
    alternatives = {"compress": 2, "squeeze": 8}

    def __init__(self, dim: int, *, compress: Size = 3, squeeze: Size = 30) -> None:
        super().__init__()
        for key, ratio in (("compress", compress), ("squeeze", squeeze)):
            if not 1 <= ratio <= dim:
                raise OptionError(key, f"{ratio} is not between 1 and the {dim} channels.")
        self.conv1 = nn.Conv2d(dim, dim // compress, 3, padding=1)
        self.conv2 = nn.Conv2d(dim // compress, dim, 3, padding=1)
        self.fc1 = nn.Linear(dim, dim // squeeze)
        self.fc2 = nn.Linear(dim // squeeze, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        self.refuse_padding(mask, document_ids)
        if x.ndim not in (4, 5):
            raise ConfigError(
                f"channel_mixer: channel_attention_conv takes images or clips, not {x.ndim - 2} grid axes."
            )
        frames = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
        u = self.conv2(F.gelu(self.conv1(frames))).permute(0, 2, 3, 1)
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(u.mean((1, 2))))))
        return (u * scale[:, None, None]).reshape(x.shape)

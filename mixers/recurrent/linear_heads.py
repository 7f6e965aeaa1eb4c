"""What linear attention and the delta rule share: projections, short convolution, state and read-out.

Axis letters: B batch, N tokens, C channels, H heads, K key channels per head, V value channels per head.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...schema import Size
from .recurrent_mixer import RecurrentMixer, ShortConv


class LinearState(NamedTuple):
    """conv: (B, taps - 1, channels); memory: float32 (B, H, K, V); position: (B,) int64, tokens so far."""

    conv: Tensor
    memory: Tensor
    position: Tensor


class HeadSizes(TypedDict, total=False):
    """What both take; see `LinearHeads`."""

    num_heads: Size | None
    head_dim: Size
    head_v_dim: Size | None


class LinearHeads(RecurrentMixer):
    """Projections, short convolution, state and read-out that linear attention and the delta rule share.

    Args:
        dim: number of channels C.
        num_heads: number of heads H; by default `max(1, dim // head_dim)`.
        head_dim: key channels per head K.
        head_v_dim: value channels per head V; by default `head_dim`.
    """

    def __init__(
        self, dim: int, *, num_heads: Size | None = None, head_dim: Size = 64, head_v_dim: Size | None = None
    ) -> None:
        super().__init__()
        self.num_heads = max(1, dim // head_dim) if num_heads is None else num_heads
        self.head_dim = head_dim
        self.head_v_dim = head_dim if head_v_dim is None else head_v_dim
        self.key_width = self.num_heads * head_dim
        self.value_width = self.num_heads * self.head_v_dim

    def _build(self, dim: int, extra: tuple[int, ...], d_conv: int, output_gate: bool, norm_eps: float | None) -> None:
        self.qkv_width = 2 * self.key_width + self.value_width
        self.parts = (self.qkv_width, self.value_width if output_gate else 0, *extra)
        self.in_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.conv1d = ShortConv(self.qkv_width, d_conv, bias=False) if d_conv else None
        self.norm = None if norm_eps is None else nn.RMSNorm(self.head_v_dim, eps=norm_eps)
        self.out_proj = nn.Linear(self.value_width, dim, bias=False)

    def _reset(self) -> None:
        """Xavier uniform with gain 2^-2.5 for every projection by itself, as in RetNet and GLA."""
        widths = (self.key_width, self.key_width, self.value_width, *self.parts[1:])
        with torch.no_grad():
            for weight in (*self.in_proj.weight.split([w for w in widths if w]), self.out_proj.weight):
                nn.init.xavier_uniform_(weight, gain=2**-2.5)
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def _project(
        self,
        x: Tensor,
        real: Tensor | None,
        document_ids: Tensor | None,
        state: LinearState | None,
        return_state: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The parts of the projection, the first one convolved; and the state of the convolution."""
        qkv, *rest = self.in_proj(x).split(self.parts, -1)
        conv = None
        if self.conv1d is not None:
            before = None if state is None else state.conv
            qkv, conv = self.conv1d(qkv, real=real, document_ids=document_ids, state=before, return_state=return_state)
        return (qkv, *rest), conv

    def _project_step(self, x_t: Tensor, state: LinearState) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same of one token (B, C)."""
        qkv, *rest = self.in_proj(x_t).split(self.parts, -1)
        conv = state.conv
        if self.conv1d is not None:
            qkv, conv = self.conv1d.step(qkv, conv)
        return (qkv, *rest), conv

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split((self.key_width, self.key_width, self.value_width), -1)
        heads = (self.num_heads, -1)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.norm is not None:
            y = self.norm(y)
        y = y.flatten(-2)
        if gate.shape[-1]:
            y = y * F.silu(gate)
        return self.out_proj(y)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LinearState:
        where = self.memory_format(device, dtype)
        conv = torch.zeros(batch, 0, 0, **where) if self.conv1d is None else self.conv1d.init_state(batch, **where)
        memory = torch.zeros(batch, self.num_heads, self.head_dim, self._memory_width(), device=where["device"])
        return LinearState(conv, memory, torch.zeros(batch, device=where["device"], dtype=torch.int64))

    def _memory_width(self) -> int:
        return self.head_v_dim

    def _advance(self, x: Tensor, real: Tensor | None, state: LinearState | None) -> tuple[Tensor, LinearState]:
        """The state to start from, and positions (B or 1, N)."""
        before = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        index = torch.arange(x.shape[1], device=x.device)[None]
        return (index if state is None else before.position[:, None] + index), before

    def _after(
        self, x: Tensor, real: Tensor | None, before: LinearState, conv: Tensor | None, memory: Tensor
    ) -> LinearState:
        added = x.shape[1] if real is None else real.sum(1)
        return LinearState(before.conv if conv is None else conv, memory, before.position + added)

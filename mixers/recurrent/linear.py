"""Linear attention: a matrix-valued state per head, with the decays of the literature.

Axis letters: B batch, N tokens, C channels, H heads, K key channels per head, V value channels per head, R rank of the
gate. `*grid` is (N,), (H, W) or (T, H, W), read in raster order.
"""

from __future__ import annotations

from typing import Annotated, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError
from ...kernels.gla import gla, gla_step
from ...kernels.ssd import ssd, ssd_step
from ...schema import Between, Count, Size
from ..layers import full_precision
from ..positions import rotate
from .linear_heads import HeadSizes, LinearHeads, LinearState

FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
}


def retention_decay(heads: int, device: torch.device | None = None) -> Tensor:
    """log gamma of every head: gamma_h = 1 - 2^(-5-h). RetNet (2023), arXiv:2307.08621."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, device=device, dtype=torch.float32))))


def lightning_decay(heads: int, rate: float, device: torch.device | None = None) -> Tensor:
    """log gamma_h = -rate h / H. Lightning Attention (2024), arXiv:2401.04658; head 0 keeps all."""
    return -(rate / heads) * torch.arange(heads, device=device, dtype=torch.float32)


class LinearAttention(LinearHeads, name="linear_attention"):
    """Linear attention with a choice of decay. Katharopoulos et al. (2020), arXiv:2006.16236.

        S_t = decay_t * S_{t-1} + phi(k_t) v_t^T;   y_t = scale * phi(q_t) S_t;   out_proj(norm(y) * silu(gate))

    Args:
        dim, sizes: see `LinearHeads`.
        decay: "none"; "retention" and "lightning" are fixed per head (arXiv:2307.08621, arXiv:2401.04658); "scalar" is
            computed from the token, one per head (simple GLA); "channel" one per key channel (GLA, arXiv:2312.06635).
        feature_map: phi: "identity", "elu" (elu + 1), "relu" or "silu".
        normalize: divide by `scale * phi(q_t) sum_s decayed phi(k_s)`, as softmax does.
        gate_rank: rank R of the projection to the decays of "channel".
        gate_logit_normalizer: computed decays are `sigmoid(.) ** (1 / gate_logit_normalizer)`.
        d_conv: taps of a causal convolution with silu over queries, keys and values; 0 for none.
        output_gate: multiply with silu of a projection of the input.
        output_norm: RMS norm of every head.
        position: "none", the default where the model has no say, or "rotary" (RetNet).
        lightning_rate: log decay of the last head of "lightning"; by default 8 (1 - layer / layers), as published.
        layer_index, num_layers: position in the model, and how many there are.

    Shapes: `x` and the result `(B, *grid, C)`. The state is constant: H x K x V float32 numbers per row.

    Raises:
        ConfigError: unknown choice or a size that is not positive.
    """

    source = "Transformers are RNNs (2020), arXiv:2006.16236"
    equation = "S_t = decay_t S_{t-1} + phi(k_t) v_t^T, y_t = phi(q_t) S_t"
    alternatives = {
        "num_heads": 2,
        "head_dim": 16,
        "head_v_dim": 16,
        "decay": "scalar",
        "feature_map": "silu",
        "gate_rank": 4,
        "gate_logit_normalizer": 1.0,
        "d_conv": 4,
        "position": "rotary",
        "lightning_rate": 4.0,
    }
    requires = {
        "gate_rank": {"decay": "channel"},
        "gate_logit_normalizer": {"decay": "channel"},
        "lightning_rate": {"decay": "lightning", "num_heads": 2},
    }

    def __init__(
        self,
        dim: int,
        *,
        decay: Literal["none", "retention", "lightning", "scalar", "channel"] = "none",
        feature_map: Literal["identity", "elu", "relu", "silu"] = "elu",
        normalize: bool = True,
        gate_rank: Size = 16,
        gate_logit_normalizer: Annotated[float, Between(1e-3, 1e6)] = 16.0,
        d_conv: Count = 0,
        output_gate: bool = False,
        output_norm: bool = False,
        position: Literal["none", "rotary"] | None = None,
        lightning_rate: Annotated[float, Between(0, 1e4)] | None = None,
        layer_index: Count = 0,
        num_layers: Size = 1,
        **sizes: Unpack[HeadSizes],
    ) -> None:
        super().__init__(dim, **sizes)
        if position == "rotary" and self.head_dim % 2:
            raise OptionError("head_dim", f"{self.head_dim} is odd; rotary positions need pairs of channels.")
        self.decay, self.feature_map, self.normalize, self.position = decay, feature_map, normalize, position or "none"
        self.gate_logit_normalizer = gate_logit_normalizer
        gates = {"scalar": self.num_heads, "channel": gate_rank}.get(decay, 0)
        self._build(dim, (gates,), d_conv, output_gate, 1e-5 if output_norm else None)
        self.decay_proj = nn.Linear(gate_rank, self.key_width) if decay == "channel" else None
        self.decay_bias = nn.Parameter(torch.empty(self.num_heads)) if decay == "scalar" else None
        self.lightning_rate = 8.0 * (1 - layer_index / num_layers) if lightning_rate is None else lightning_rate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform with gain 2^-2.5, zero bias of the decays."""
        self._reset()
        if self.decay_proj is not None:
            nn.init.xavier_uniform_(self.decay_proj.weight, gain=2**-2.5)
            nn.init.zeros_(self.decay_proj.bias)
        if self.decay_bias is not None:
            nn.init.zeros_(self.decay_bias)

    def _memory_width(self) -> int:
        return self.head_v_dim + self.normalize  # the last column sums the keys

    def _log_decay(self, gates: Tensor) -> Tensor | None:
        """(..., H) or (..., H, K) float32, or None."""
        if self.decay_proj is not None:
            logits = self.decay_proj(gates).unflatten(-1, (self.num_heads, self.head_dim))
        elif self.decay_bias is not None:
            logits = gates + self.decay_bias
        elif self.decay == "none":
            return None
        else:
            # computed, not kept as a buffer: a model cast to bfloat16 would round it
            fixed = (
                retention_decay(self.num_heads, gates.device)
                if self.decay == "retention"
                else lightning_decay(self.num_heads, self.lightning_rate, gates.device)
            )
            return fixed.expand(*gates.shape[:-1], self.num_heads)
        return F.logsigmoid(full_precision(logits)) / self.gate_logit_normalizer

    def _features(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k), and v with a column of ones where the sum of the keys is needed; all (B, N, H, .)."""
        q, k, v = self._split_heads(qkv)
        phi = FEATURE_MAPS[self.feature_map]
        q, k = phi(q), phi(k)
        if self.position == "rotary":
            q, k = rotate(q, positions), rotate(k, positions)
        if not self.normalize:
            return q, k, v
        # Both sums outgrow float16 after some thousand tokens, though their quotient does not: y has the dtype of v.
        return q, k, F.pad(full_precision(v) if v.dtype == torch.float16 else v, (0, 1), value=1.0)

    def _read(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.normalize:
            y, total = full_precision(y).split((self.head_v_dim, 1), -1)
            y = (y / (total + 1e-10)).to(gate.dtype)
        return self._output(y, gate)

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: LinearState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LinearState | None]:
        (qkv, gate, gates), conv = self._project(x, real, document_ids, state, return_state)
        positions, before = self._advance(x, real, state)
        q, k, v = self._features(qkv, positions)
        g = self._log_decay(gates)
        if real is not None:
            k = k * real[..., None, None]
            g = None if g is None else g * real.view(*real.shape, *([1] * (g.ndim - 2)))
        scale = self.head_dim**-0.5
        initial = None if state is None else state.memory
        if self.decay == "channel":
            assert g is not None
            result = gla(
                q, k, v, g, scale=scale, initial_state=initial, document_ids=document_ids,
                return_final_state=return_state,
            )  # fmt: skip
        else:
            result = ssd(
                q, k, v, g, scale=scale, initial_state=initial, document_ids=document_ids,
                return_final_state=return_state,
            )  # fmt: skip
        y, memory = result if isinstance(result, tuple) else (result, None)
        if real is not None and self.normalize:
            y = y.masked_fill(~real[..., None, None], 1.0)  # the sum of no keys is zero
        return self._read(y, gate), None if memory is None else self._after(x, real, before, conv, memory)

    def step(self, x_t: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        (qkv, gate, gates), conv = self._project_step(x_t, state)
        q, k, v = (t.squeeze(1) for t in self._features(qkv[:, None], state.position[:, None]))
        g = self._log_decay(gates)
        scale = self.head_dim**-0.5
        if self.decay == "channel" and g is not None:
            y, memory = gla_step(q, k, v, g, state.memory, scale=scale)
        else:
            y, memory = ssd_step(q, k, v, g, state.memory, scale=scale)
        return self._read(y, gate), LinearState(conv, memory, state.position + 1)

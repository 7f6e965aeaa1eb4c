"""The delta rule: a matrix-valued state per head that is corrected instead of added to.

Axis letters: B batch, N tokens, C channels, H heads, K key channels per head, V value channels per head. `*grid` is
(N,), (H, W) or (T, H, W), read in raster order.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.delta_rule import delta_rule, delta_rule_step
from ...schema import Count, Epsilon
from .linear_heads import HeadSizes, LinearHeads, LinearState
from .recurrent_mixer import log_uniform_dt_bias


class Delta(LinearHeads, name="delta"):
    """A state that overwrites what it holds under a key, with a gate. Gated DeltaNet (2024), arXiv:2412.06464.

        S' = exp(g_t) S_{t-1};   S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T;   y_t = scale * q_t S_t

    q and k have unit length, beta_t = sigmoid(.) and g_t = -exp(A_log) softplus(. + dt_bias) come from the token.
    Without the gate (`gated=False`) it is DeltaNet (2024), arXiv:2406.06484.

    Args:
        dim, sizes: see `LinearHeads`.
        gated: whether the state decays (Gated DeltaNet) or not (DeltaNet).
        d_conv: taps of the causal convolution with silu over queries, keys and values; 0 for none.
        output_gate: multiply with silu of a projection of the input, after the RMS norm of every head.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1). arXiv:2411.12537.
        norm_eps: of the RMS norm of every head.

    Shapes: `x` and the result `(B, *grid, C)`. The state is constant: H x K x V float32 numbers per row.

    Raises:
        ConfigError: a size that is not positive.
    """

    source = "Gated Delta Networks (2024), arXiv:2412.06464"
    equation = "S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T, y_t = q_t S_t"
    alternatives = {"num_heads": 2, "head_dim": 16, "head_v_dim": 16, "d_conv": 0, "norm_eps": 0.1}

    def __init__(
        self,
        dim: int,
        *,
        gated: bool = True,
        d_conv: Count = 4,
        output_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: Epsilon = 1e-5,
        **sizes: Unpack[HeadSizes],
    ) -> None:
        super().__init__(dim, **sizes)
        self.allow_neg_eigval = allow_neg_eigval
        self._build(dim, (self.num_heads, self.num_heads if gated else 0), d_conv, output_gate, norm_eps)
        self.A_log = nn.Parameter(torch.empty(self.num_heads)) if gated else None
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads)) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform with gain 2^-2.5; A uniform in (1, 16) and log-uniform dt as in Mamba-2."""
        self._reset()
        if self.A_log is not None and self.dt_bias is not None:
            with torch.no_grad():
                self.A_log.uniform_(1.0, 16.0).log_()
            log_uniform_dt_bias(self.dt_bias, 0.001, 0.1, 1e-4)

    def _inputs(self, qkv: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v = self._split_heads(qkv if self.conv1d is not None else F.silu(qkv))
        return q, k, v, b, a if self.A_log is not None else None

    def _gates(self) -> dict[str, Any]:
        """Options of the op."""
        gates = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        return {"normalize": True, "beta_range": 2.0 if self.allow_neg_eigval else 1.0} | gates

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: LinearState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LinearState | None]:
        (qkv, gate, b, a), conv = self._project(x, real, document_ids, state, return_state)
        _, before = self._advance(x, real, state)
        q, k, v, beta, g = self._inputs(qkv, b, a)
        if real is not None:
            padding = ~real[..., None]  # neither writes nor decays
            beta = beta.masked_fill(padding, -torch.inf)
            g = None if g is None else g.masked_fill(padding, -torch.inf)
        result = delta_rule(
            q, k, v, beta, g, scale=self.head_dim**-0.5, initial_state=None if state is None else state.memory,
            document_ids=document_ids, return_final_state=return_state, **self._gates(),
        )  # fmt: skip
        y, memory = result if isinstance(result, tuple) else (result, None)
        return self._output(y, gate), None if memory is None else self._after(x, real, before, conv, memory)

    def step(self, x_t: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        (qkv, gate, b, a), conv = self._project_step(x_t, state)
        q, k, v, beta, g = self._inputs(qkv, b, a)
        y, memory = delta_rule_step(q, k, v, beta, g, state.memory, scale=self.head_dim**-0.5, **self._gates())
        return self._output(y, gate), LinearState(conv, memory, state.position + 1)

"""Sparsifiner: attention over a sparse connectivity that is predicted for every input.

Axis letters: B batch, N tokens, C channels, H heads, D channels per head, d reduced channels per head, K basis vectors.
`*grid` is (N,), (H, W) or (T, H, W), flattened in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import dense_attention
from ...schema import Count, Fraction, NonNegative, Share, Size
from ..base import Grid, Mixer
from ..layers import FullPrecisionLinear, full_precision
from ..losses import aux_loss
from ..positions import without_padding
from ..resize import resize_tokens_weight


class ConnectivityPredictor(nn.Module):
    """Which keys a query attends to, from a low-rank guess at the attention matrix.

    `coef = softmax(q' (k'^T P_in) / sqrt(H))` over K, with q' and k' the queries and keys reduced to d channels; the
    largest coefficients stay; `score = coef |P_out|^T`, small entries of the basis |P_out| left out; each row of scores
    keeps its largest. Products run in float32 whatever autocast says, since a ranking does not bear rounding.

    Args:
        tokens: N, the class token included.
        basis: K.
        head_dim, reduced: D and d.
        num_heads: H, in the published scale of the coefficients.
        shared: P_in and P_out are one table.
        budget: keys that a row keeps, by rank; at least N for all.
        basis_threshold: entries of |P_out| not above it count as 0.
        coef_topk: coefficients that a row keeps, by rank; 0 for all.
        coef_threshold: coefficients not above it count as 0.
        score_threshold: scores not above it are dropped, whatever the budget; None for no such rule.
    """

    def __init__(
        self,
        tokens: int,
        basis: int,
        head_dim: Size,
        reduced: int,
        *,
        num_heads: Size,
        shared: bool,
        budget: int,
        basis_threshold: Fraction,
        coef_topk: Count,
        coef_threshold: NonNegative,
        score_threshold: NonNegative | None,
    ) -> None:
        super().__init__()
        self.scale = num_heads**-0.5
        self.budget = budget
        self.basis_threshold, self.coef_topk = basis_threshold, coef_topk
        self.coef_threshold, self.score_threshold = coef_threshold, score_threshold
        self.proj_q = FullPrecisionLinear(head_dim, reduced)
        self.proj_k = FullPrecisionLinear(head_dim, reduced)
        self.basis_in = nn.Parameter(torch.empty(tokens, basis))
        self.basis_out = self.basis_in if shared else nn.Parameter(torch.empty(tokens, basis))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal with standard deviation 0.02, zero biases, as published."""
        for table in (self.basis_in, self.basis_out, self.proj_q.weight, self.proj_k.weight):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.proj_q.bias)
        nn.init.zeros_(self.proj_k.bias)

    def coefficients(self, q: Tensor, k: Tensor, valid: Tensor | None, first: int) -> Tensor:
        """Dense coefficients `(B, H, N, K)` of queries and keys `(B, H, N, D)`; `first` skips rows of the tables."""
        k = self.proj_k(k)
        if valid is not None:
            k = k.masked_fill(~valid[:, None, :, None], 0.0)
        logits = self.proj_q(q) @ (k.mT @ full_precision(self.basis_in[first:]))
        return (logits * self.scale).softmax(-1)

    def scores(self, coef: Tensor, first: int) -> Tensor:
        """Sparse coefficients times the sparse basis: `(B, H, N, N)`, at least 0."""
        if 0 < self.coef_topk < coef.shape[-1]:
            value, index = coef.topk(self.coef_topk, sorted=False)
            coef = torch.zeros_like(coef).scatter(-1, index, value)
        if self.coef_threshold > 0:
            coef = F.threshold(coef, self.coef_threshold, 0.0)
        basis = full_precision(self.basis_out[first:]).abs()
        return coef @ F.threshold(basis, self.basis_threshold, 0.0).mT

    def forward(self, q: Tensor, k: Tensor, valid: Tensor | None, *, class_token: bool, first: int) -> Tensor:
        """The connectivity `(B, H, N, N)`, bool, of queries and keys `(B, H, N, D)`; without a gradient.

        Args:
            q, k: queries and keys.
            valid: `(B, N)`, False for tokens that nothing attends to.
            class_token: the first token is the class token, which attends to all and does not count as kept.
            first: first row of the tables that belongs to these tokens.
        """
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            score = self.scores(self.coefficients(q, k, valid, first), first)
            if valid is not None:
                score = score.masked_fill(~valid[:, None, None, :], -math.inf)
            visible = torch.ones_like(score, dtype=torch.bool)
            if self.budget < score.shape[-1]:
                index = score.topk(self.budget, -1).indices
                chosen = torch.ones_like(index, dtype=torch.bool)
                if valid is not None:  # the budget of a sample is never above the number of its tokens
                    kept = valid[:, int(class_token) :].sum(1).clamp(min=1)
                    chosen = (torch.arange(self.budget, device=q.device) < kept[:, None])[:, None, None].expand_as(
                        index
                    )
                visible = torch.zeros_like(visible).scatter(-1, index, chosen)
            if self.score_threshold is not None:
                visible = visible & (score > self.score_threshold)
            if class_token:
                visible[:, :, 0] = True
            return visible if valid is None else visible & valid[:, None, None, :]

    def reconstruction_loss(self, q: Tensor, k: Tensor, valid: Tensor | None, *, scale: float, first: int) -> Tensor:
        """Squared error of the guess at the attention matrix: summed over keys, mean over queries, heads and batch.

        Queries and keys are taken as given: the loss trains the predictor alone.
        """
        with torch.autocast(q.device.type, enabled=False):
            q, k = full_precision(q.detach()), full_precision(k.detach())
            logits = q @ k.mT * scale
            if valid is not None:
                logits = logits.masked_fill(~valid[:, None, None, :], -1e30)
            guess = self.coefficients(q, k, valid, first) @ full_precision(self.basis_out[first:]).mT
            error = (guess - logits.softmax(-1)).square()
            if valid is not None:
                error = error * valid[:, None, None, :]
            return error.sum(-1).mean()


class Sparsifiner(Mixer, name="sparsifiner"):
    """Attention of every query to the few keys that a predictor finds for it. Wei et al. (2023), arXiv:2303.13755.

    `y = proj(softmax(q k^T / sqrt(D) over the predicted keys) v)`; see `ConnectivityPredictor`. Budgets by rank and by
    threshold may be combined; a query that is left without any key gets zeros. As in the official code the attention is
    computed with a mask, so sparsity saves no time.

    The choice of keys has no gradient. In training the predictor learns from its own loss, the reconstruction of the
    dense attention matrix, which leaves by `aux_loss("connectivity", ...)`; outputs and all other gradients are as
    without it. (The official recipe trains predictor and backbone in turns.)

    Args:
        dim: number of channels C.
        grid: sizes of the grid, without the class token.
        num_heads: number of heads H; by default `max(1, dim // head_dim)`.
        head_dim: channels per head D.
        qkv_bias: bias of the projection to queries, keys and values.
        attn_keep_rate: each query keeps ceil(rate * N) keys; 1 keeps all.
        reduce_n_factor: N over the number of basis vectors K; the released configuration has 6.
        reduce_c_factor: D over the reduced channels d.
        share_inout_proj: one table in place of two.
        basis_threshold: entries of the basis not above it are left out.
        coef_topk: coefficients that each query keeps, 0 for all.
        coef_threshold: coefficients not above it are left out (the official alternative to `coef_topk`: 0.05).
        score_threshold: keys with a score not above it are left out (the official alternative to the budget by
            `attn_keep_rate`: 1e-4, with `attn_keep_rate=1`); None for no threshold.
        class_token: the tables have one row more, the first, for a class token. The input is then a sequence
            `(B, 1 + N, C)` with the class token first, which attends to all tokens, or a map without one.
        reconstruction_weight: of the predictor's loss; 0 leaves the predictor as it is.

    Shapes: `x` and the result `(B, *grid, C)`, or `(B, 1 + N, C)` with a class token; `mask` accordingly: False tokens
    are never attended to and do not count in the budget, which is at most the number of patches that are left.

    Raises:
        ConfigError: sizes or rates out of range, or tokens of another grid.
    """

    needs_grid = True
    masks = True
    gives_attention = True
    complexity = "N^3"  # scores are (N, K) times (K, N), and K = N / reduce_n_factor grows with N
    memory = "N^2"
    source = "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient ViTs (2023), arXiv:2303.13755"
    equation = "y_i = softmax(q_i k_J^T / sqrt(D)) v_J W_o, J: the keys that a low-rank predictor ranks first"
    alternatives = {
        "num_heads": 2,
        "head_dim": 16,
        "attn_keep_rate": 0.5,
        "reduce_n_factor": 2,
        "reduce_c_factor": 4,
        "basis_threshold": 0.0,
        "coef_topk": 2,
        "coef_threshold": 0.25,
        "score_threshold": 0.01,
    }
    requires = {"coef_topk": {"reduce_n_factor": 2}, "coef_threshold": {"reduce_n_factor": 6}}
    inert = frozenset({"reconstruction_weight"})  # changes the auxiliary loss only
    aux_losses = {"connectivity": ("predictor",)}

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid,
        num_heads: Size | None = None,
        head_dim: Size = 32,
        qkv_bias: bool = True,
        attn_keep_rate: Share = 0.25,
        reduce_n_factor: Size = 6,
        reduce_c_factor: Size = 2,
        share_inout_proj: bool = False,
        basis_threshold: Fraction = 0.02,
        coef_topk: Count = 8,
        coef_threshold: NonNegative = 0.0,
        score_threshold: NonNegative | None = None,
        class_token: bool = False,
        reconstruction_weight: NonNegative = 0.01,
    ) -> None:
        super().__init__()
        self.grid, self.class_token = tuple(grid), class_token
        self.num_heads = max(1, dim // head_dim) if num_heads is None else num_heads
        self.head_dim = head_dim
        self.attn_keep_rate, self.reduce_n_factor = attn_keep_rate, reduce_n_factor
        self.reconstruction_weight = reconstruction_weight
        width = self.num_heads * head_dim
        tokens = prod(grid) + int(class_token)
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)
        self.predictor = ConnectivityPredictor(
            tokens,
            max(1, tokens // reduce_n_factor),
            head_dim,
            max(1, head_dim // reduce_c_factor),
            num_heads=self.num_heads,
            shared=share_inout_proj,
            budget=math.ceil(attn_keep_rate * tokens),
            basis_threshold=basis_threshold,
            coef_topk=coef_topk,
            coef_threshold=coef_threshold,
            score_threshold=score_threshold,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02 and zero biases, as published."""
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.predictor.reset_parameters()

    def has_class_token(self, x: Tensor) -> bool:
        """Whether `x` starts with a class token, after checking its shape."""
        if self.class_token and x.ndim == 3 and x.shape[1] == prod(self.grid or ()) + 1:
            return True
        self.check_grid(x)
        return False

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, token_attention: bool = False, diluted: bool = False
    ) -> Any:
        """Tokens `(B, *grid, C)` or `(B, 1 + N, C)` to the same shape.

        Args:
            x: the tokens.
            mask: `(B, *grid)` or `(B, 1 + N)`, bool.
            token_attention: also give how the class token attends, `(B, H, 1 + N)`.
            diluted: as the official code does, let the class token attend to masked tokens with logit and value 0.
        """
        with_token = self.has_class_token(x)
        x = without_padding(x, mask)
        first = int(self.class_token and not with_token)
        qkv = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        valid = None if mask is None else mask.flatten(1)
        visible = self.predictor(q, k, valid, class_token=with_token, first=first)
        if valid is not None and diluted and with_token:
            hidden = ~valid[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            visible[:, :, 0] = True
        seen = visible.any(-1, keepdim=True)
        # a row without keys would be 0 / 0: it sees everything, and its result is dropped
        y = dense_attention(q, k, v, visible | ~seen)
        y = self.proj((y * seen).transpose(1, 2).flatten(2)).reshape(x.shape)
        scale = self.head_dim**-0.5
        if self.training and self.reconstruction_weight > 0 and torch.is_grad_enabled():
            loss = self.predictor.reconstruction_loss(q, k, valid, scale=scale, first=first)
            aux_loss("connectivity", self.reconstruction_weight * loss)
        if not token_attention:
            return y
        if not with_token:
            raise ConfigError(f'mixer "{self.name}": token_attention needs a class token in front of the tokens.')
        logits = (q[:, :, :1] @ k.mT).float() * scale
        return y, logits.masked_fill(~visible[:, :, :1], -math.inf).softmax(-1)[:, :, 0]

    @torch.no_grad()
    def resize_grid(self, grid: Grid) -> None:
        """Another grid of the same rank: the rows of both tables, one for each token, are interpolated bicubically.

        The row of the class token stays as it is. The predictor sums over the rows of P_in, which are scaled for it. K
        follows N: the basis is repeated, which leaves dense scores as they are, or cut.
        """
        old = self.grid or ()
        grid = tuple(grid)
        if len(grid) != len(old):
            raise ConfigError(f'mixer "{self.name}": cannot be resized from the grid {old} to {grid}.')
        first = int(self.class_token)
        predictor = self.predictor
        shared = predictor.basis_in is predictor.basis_out

        def resized(table: nn.Parameter, summed: tuple[int, ...]) -> nn.Parameter:
            rows = resize_tokens_weight(table.detach()[first:], old, grid, (0,), summed=summed)
            whole = torch.cat([table.detach()[:first], rows])
            return nn.Parameter(whole[:, columns].contiguous(), table.requires_grad)

        tokens = prod(grid) + first
        columns = torch.arange(max(1, tokens // self.reduce_n_factor), device=predictor.basis_in.device)
        columns = columns % predictor.basis_in.shape[1]
        predictor.basis_in = resized(predictor.basis_in, () if shared else (0,))
        predictor.basis_out = predictor.basis_in if shared else resized(predictor.basis_out, ())
        predictor.budget = math.ceil(self.attn_keep_rate * tokens)
        self.grid = grid

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the official `Attention`, whose `mask_predictor` is our `predictor`."""
        renamed = {
            "mask_predictor.proj_n": "predictor.basis_in",
            "mask_predictor.proj_back_n": "predictor.basis_out",
            "mask_predictor.proj_c_q": "predictor.proj_q",
            "mask_predictor.proj_c_k": "predictor.proj_k",
        }
        out = {}
        for key, value in state_dict.items():
            stem, _, leaf = key.rpartition(".")
            if key in renamed:
                key = renamed[key]
            elif stem in renamed:
                key = f"{renamed[stem]}.{leaf}"
            out[key] = value
        return out

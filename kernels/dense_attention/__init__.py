"""Softmax attention of all queries to all keys, of "Attention Is All You Need" (2017, arXiv:1706.03762).

B batch, N queries, M keys, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import ConfigError
from ..common.dispatch import Op, check_divides, check_shapes, without_triton

__all__ = ["dense_attention"]

_DENSE_ATTENTION = Op("dense_attention", __name__)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """y = softmax(q k^T / sqrt(D) + bias) v.

    This is `torch.nn.functional.scaled_dot_product_attention`, which never forms N x M. On CPUs it also has gradients
    of gradients, forward-mode derivatives and a rule for `torch.func`, which PyTorch's fused attention has not; these
    do form N x M. That is what the operator is for: forward and backward of the attention of vit_small_patch16 at 4
    images of 224 x 224 on two cores take 1.04 times PyTorch's own, which keeps as much; the definition keeps 19% more.
    There is no Triton path, and `MIXERZOO_KERNELS=triton` leaves it as it is.

    Args:
        q: (B, H, N, D).
        k, v: (B, G, M, D); head h uses key-value head h // (H / G).
        bias: bool (what is visible) or float (added to the scores), broadcast to (B, H, N, M). Every query sees a key.
        causal: only keys up to the query's index; not with a bias.
        backend: "auto", "eager" or "reference".

    Returns:
        (B, H, N, D) in the dtype of q.

    Raises:
        ConfigError: shapes that do not fit, or causal with a bias.
    """
    check_shapes("dense_attention", q=("B H N D", q), k=("B G M D", k), v=("B G M D", v))
    check_divides("dense_attention", q.shape[1], "heads", k.shape[1], "key-value heads")
    if causal and bias is not None:
        raise ConfigError("dense_attention: causal=True cannot be given with a bias.")
    return _DENSE_ATTENTION(without_triton(backend), q, k, v, bias, causal)

"""Heads of language models.

Axis letters: B batch, N tokens, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError
from ...mixers.layers import rename_parameters
from ...mixers.part import Part, states
from ...mixers.positions import without_padding
from ...schema import Count, Parts, Probability
from .norms import ACTIVATIONS, NORMS

# what a head may know of the model's configuration
LANGUAGE_HEADS = Parts(
    "objective",
    __name__,
    context=("vocab_size", "tie_embeddings", "num_classes", "pool", "head_act", "norm", "dropout"),
)


class LanguageHead(Part):
    """What heads of language models state; they are registered by the objective that they serve.

    A head is called with normed features (B, N, C), and with `mask=` (B, N) where it `masks`. One that treats tokens
    alone also serves decoding, token by token.

    Class data, besides that of a `Part`:
        vocabulary: path inside of the head of the layer that gives logits over the vocabulary, "" for the head itself;
            None for no such layer.
        causal_model: whether the model must be causal; None for either.
    """

    axes = (1,)
    vocabulary: ClassVar[str | None] = None
    causal_model: ClassVar[bool | None] = None


class TiedLinear(nn.Linear):
    """A linear layer whose weight is another module's, set by `tie`. Files hold that weight once, under its own name.

    `(..., C)` to `(..., V)`; the bias is its own.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def tie(self, weight: Tensor) -> None:
        """Share a weight `(V, C)`."""
        self.weight = weight  # pyright: ignore[reportAttributeAccessIssue] - a parameter, which is known as a tensor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(  # the signature is torch's
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        rest = {k: v for k, v in state_dict.items() if k != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:
            missing_keys.remove(key)
        if key in state_dict:
            unexpected_keys.append(key)


def vocabulary_layer(dim: int, vocab_size: int, *, tied: bool, bias: bool = False) -> nn.Linear:
    """Logits over the vocabulary, (..., C) -> (..., V).

    Args:
        dim: C.
        vocab_size: V.
        tied: with the matrix of the token embedding, see `TiedLinear`.
        bias: whether to add a bias, at first zero.
    """
    return (TiedLinear if tied else nn.Linear)(dim, vocab_size, bias=bias)


def tie_layers(head: nn.Module, weight: Tensor) -> None:
    """Give all tied layers inside of a head the matrix of the token embedding."""
    for layer in head.modules():
        if isinstance(layer, TiedLinear):
            layer.tie(weight)


@LANGUAGE_HEADS.register("causal_lm")
@states(LanguageHead, vocabulary="", causal_model=True)
def causal_lm(dim: int, *, vocab_size: int, tie_embeddings: bool = True) -> nn.Linear:
    """Logits of the next token, (B, N, C) -> (B, N, V): one linear layer, by itself so that adapters find it."""
    return vocabulary_layer(dim, vocab_size, tied=tie_embeddings)


@LANGUAGE_HEADS.register("features")
def features(dim: int) -> nn.Module:
    """The features themselves, (B, N, C) -> (B, N, C)."""
    return nn.Identity()


@LANGUAGE_HEADS.register("masked_lm")
class MaskedLMHead(nn.Module, LanguageHead):
    """Dense layer, activation and norm before the logits, which have a bias. BERT (2018), arXiv:1810.04805.

    Args:
        dim: C.
        vocab_size: V.
        tie_embeddings: with the matrix of the token embedding.
        norm: norm by name or mapping.
        head_act: activation by name.
    """

    vocabulary = "decoder"
    causal_model = False
    alternatives = {"norm": "layer_norm", "head_act": "relu"}
    formerly: ClassVar = {"weight": "decoder.weight", "bias": "decoder.bias"}

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int,
        tie_embeddings: bool = True,
        norm: Any = "rms_norm",
        head_act: str = "gelu",
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.act = ACTIVATIONS.build(head_act, key="head_act")
        self.norm = NORMS.build(norm, dim, key="norm")
        self.decoder = vocabulary_layer(dim, vocab_size, tied=tie_embeddings, bias=True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        rename_parameters(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.dense(x))))


@LANGUAGE_HEADS.register("classify")
class ClassifierHead(nn.Module, LanguageHead):
    """Pools a sequence and classifies it, (B, N, C) -> (B, K).

    Args:
        dim: C.
        num_classes: K.
        pool: "mean" over real tokens, "last" or "first" real token.
        dropout: probability before the classifier.

    Raises:
        OptionError: no class.
    """

    mixes_tokens = True
    masks = True
    alternatives = {"pool": "last", "dropout": 0.5}

    def __init__(
        self,
        dim: int,
        *,
        num_classes: Count,
        pool: Literal["mean", "last", "first"] = "mean",
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise OptionError("num_classes", f"classify needs at least one class, not {num_classes}.")
        self.pool, self.dropout = pool, dropout
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = pool(x, self.pool, mask)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.fc(x)


@LANGUAGE_HEADS.register("reconstruct")
class ReconstructionHead(nn.Module, LanguageHead):
    """All tokens of a sequence from the features at its last position, (B, N, C) -> (B, N, V).

    The decoder of MAD's compression task (2024), arXiv:2403.17844: sinusoids of the positions are added to the last
    features, then two layers without residuals and the logits, each after an RMSNorm.

    Args:
        dim: C, even.
        vocab_size: V.

    Raises:
        OptionError: an odd width.
    """

    mixes_tokens = True
    masks = True

    def __init__(self, dim: int, *, vocab_size: int) -> None:
        super().__init__()
        if dim % 2:
            raise OptionError("", f"its positions are pairs of channels, and model.dim={dim} is odd.")
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.RMSNorm(dim), nn.Linear(dim, dim), nn.GELU()]
        self.decoder = nn.Sequential(*layers, nn.RMSNorm(dim), nn.Linear(dim, vocab_size))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        last = pool(x, "last", mask)
        rate = 1e4 ** -torch.linspace(0, 1, last.shape[-1] // 2, device=x.device)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
        position = torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype)
        return self.decoder(last[:, None] + position)


def last_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last real token of every row of a mask (B, N); the last index where there is none."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).max(1).values
    return torch.where(last < 0, mask.shape[1] - 1, last)


def pool(x: Tensor, how: str, mask: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, C): "mean" over real tokens, the "last" or the "first" real one."""
    if mask is None:
        return {"mean": lambda: x.mean(1), "last": lambda: x[:, -1], "first": lambda: x[:, 0]}[how]()
    if how == "mean":
        return without_padding(x, mask).sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(x.dtype)
    index = last_index(mask) if how == "last" else mask.to(torch.int8).argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), index]

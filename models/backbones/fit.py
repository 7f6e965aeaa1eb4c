"""Whether parts fit the place where they are to stand: its grid, its causality, its padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ...mixers import Mixer
from ...mixers.part import stated
from ...schema import Parts
from ..parts.blocks import outer_mixers


def check_fit(parts: Parts, spec: Any, *, key: str, rank: int, what: str, causal: bool = False) -> None:
    """Hold a part as written in a config against the place where it is to stand.

    Args:
        parts: where it is registered.
        spec: name or mapping; None for no part.
        key: path of the configuration key.
        rank: of the grid of tokens.
        what: these tokens in words.
        causal: no token may see those after it.

    Raises:
        OptionError: a part that does not take the grid, or that mixes tokens or samples in a causal model.
    """
    if spec is None:
        return
    name, _ = parts.check(spec, key=key)
    part = parts.entries[name]
    axes = stated(part, "axes")
    if rank not in axes:
        ranks = " or ".join(map(str, axes))
        raise OptionError(key, f'the {parts.kind} "{name}" takes {ranks} grid axes, not {what}.')
    if not causal:
        return
    alone = [other for other, entry in sorted(parts.entries.items()) if _treats_tokens_alone(entry)]
    if stated(part, "mixes_tokens") and not stated(part, "causal"):
        why = "mixes all tokens of a sample, so that a token of a causal model would see those after it"
    elif stated(part, "mixes_batch"):
        why = "takes statistics over batch and tokens in training, which show a causal model the future"
    else:
        return
    raise OptionError(key, f'the {parts.kind} "{name}" {why}. Use one of: {", ".join(alone)}.')


def _treats_tokens_alone(part: Any) -> bool:
    return 1 in stated(part, "axes") and not stated(part, "mixes_tokens") and not stated(part, "mixes_batch")


def mixing_parts(root: nn.Module) -> list[nn.Module]:
    """The modules in a model that mix tokens or samples and are no token mixers, by their class data."""
    names = ("mixes_tokens", "mixes_batch")
    return [m for m in root.modules() if any(getattr(type(m), name, False) for name in names)]


def check_drops(block: nn.Module, *, key: str) -> None:
    """Raise where a block cannot follow one that drops tokens: its parts must honour the mask of those that are left.

    Raises:
        OptionError: at the key.
    """
    for part in (*outer_mixers(block), *mixing_parts(block)):
        honours = part.masks if isinstance(part, Mixer) else stated(type(part), "masks")
        if not honours:
            name = getattr(part, "name", type(part).__name__)
            raise OptionError(key, f'"{name}" follows a block that drops tokens, and cannot honour a mask.')


def check_padding(mixing: list[nn.Module], mask: Tensor | None, document_ids: Tensor | None) -> None:
    """Raise where padding or packed documents would reach real tokens through a norm or channel mixer.

    Args:
        mixing: of `mixing_parts`.
        mask, document_ids: what the model is given.

    Raises:
        ConfigError: the argument, and the part that cannot honour it.
    """
    for name, given, honours in (("mask", mask, "masks"), ("document_ids", document_ids, "packs")):
        if given is None:
            continue
        for part in mixing:
            if stated(part, "mixes_tokens") and not stated(part, honours):
                raise ConfigError(f"{name}: {type(part).__name__} mixes tokens and cannot honour it.")
            if stated(part, "mixes_batch") and part.training:
                raise ConfigError(
                    f"{name}: {type(part).__name__} takes statistics over batch and tokens in training, padding too."
                )

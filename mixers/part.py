"""What parts state about themselves, as class data: norms, activations, channel mixers, orders, schedules.

Token mixers have the same in `base.Mixer`. The checks of `contract/` hold parts to it, and backbones refuse a part
where it would show the future or padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from ..errors import ConfigError

Anything = TypeVar("Anything", bound=Callable[..., Any])


class Part:
    """Class data of a part. A class may inherit from this or just set what differs; functions are given it by `states`.

    Attributes:
        axes: ranks of grid that the part takes.
        mixes_tokens: what comes out for a token depends on other tokens of its sample.
        mixes_batch: in training it depends on other samples and their tokens.
        causal: a part that mixes tokens never shows a token those after it.
        masks: a part that mixes tokens honours `mask`; one that does not refuses it.
        packs: the same for `document_ids`.
        source, equation: paper with year and arXiv id, and what it computes in one line; as of `mixers.Mixer`.
        alternatives, requires, inert: of options, for the tests; as of `mixers.Mixer`.
        aux_losses: what the part adds by `aux_loss` in training; as of `mixers.Mixer`.
    """

    axes: ClassVar[tuple[int, ...]] = (1, 2, 3)
    mixes_tokens: ClassVar[bool] = False
    mixes_batch: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    source: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    alternatives: ClassVar[Mapping[str, Any]] = {}
    requires: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    inert: ClassVar[frozenset[str]] = frozenset()
    aux_losses: ClassVar[Mapping[str, tuple[str, ...]]] = {}


def states(kind: type[Part] = Part, /, **data: Any) -> Callable[[Anything], Anything]:
    """Decorator that gives class data to a function, or to a class of another library, e.g. `@states(axes=(3,))`.

    Args:
        kind: `Part`, or a class below it, of a kind of part that states more.
        data: what differs from the defaults of the kind.

    Raises:
        ConfigError: a name that is not class data of the kind.
    """
    for name in data:
        if not hasattr(kind, name):
            raise ConfigError(f"states: {name} is not class data of a part.")

    def state(part: Anything) -> Anything:
        for name, value in data.items():
            setattr(part, name, value)
        return part

    return state


def stated(part: Any, name: str, kind: type[Part] = Part) -> Any:
    """Class data of a part, the default of its kind where it says nothing."""
    return getattr(part, name, getattr(kind, name))

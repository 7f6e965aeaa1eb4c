"""From one raw sample, as people have it, to what a model reads: kept with the weights, so that no data are needed.

Axis letters: B batch, N tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, unknown

KINDS: dict[str, type[Preprocessing]] = {}


class Preprocessing:
    """Base of what evaluation does to a sample before the model sees it.

    A subclass is a frozen dataclass that names itself; its fields are plain values, which `describe` writes down and
    `preprocessing_of` reads. A task gives its own by `Task.preprocessing()`, and uses the same object in evaluation.

        prepare = mixerzoo.load("runs/NAME").preprocessing
        logits = model(prepare("cat.png")[None])
        inputs, more = prepare.batch(["cat.png", "dog.png"]); logits = model(inputs, **more)
        text = prepare.decode(ids)          # of texts
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            cls.kind = name
            KINDS[name] = cls

    def __call__(self, sample: Any) -> Tensor:
        """One sample, without a batch axis.

        Raises:
            ConfigError: a sample that cannot be read, or of a shape that the model was not trained for.
        """
        raise NotImplementedError

    def batch(self, samples: Iterable[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Several samples, (B, ...), and what the model takes beside them by name, such as `mask`."""
        return torch.stack([self(sample) for sample in samples]), {}

    def decode(self, ids: Any) -> str:
        """Ids (N,) as text.

        Raises:
            ConfigError: ids that stand for no text.
        """
        raise ConfigError(f'preprocessing "{self.kind}": its samples are no text, so that nothing can be decoded.')

    def describe(self) -> dict[str, Any]:
        """The kind and its settings, in plain containers."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload] - subclasses are dataclasses


def preprocessing_of(described: Mapping[str, Any] | None) -> Preprocessing | None:
    """What `describe` wrote down; None of None.

    Raises:
        ConfigError: a kind that is not there, as of a plugin that is not loaded.
    """
    if described is None:
        return None
    settings = dict(described)
    kind = settings.pop("kind")
    if kind not in KINDS:
        raise unknown("preprocessing", kind, KINDS)

    def fixed(value: Any) -> Any:
        return tuple(map(fixed, value)) if isinstance(value, list) else value

    return KINDS[kind](**{key: fixed(value) for key, value in settings.items()})

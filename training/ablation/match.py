"""Models of equal size: the width, and where that is too coarse the channel mixers' ratio, at which counts agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...errors import ConfigError
from ...models import create_model, model_config
from ...models.parts.channel_mixers import CHANNEL_MIXERS
from ...schema import keyword_options
from ...tasks import Task
from ..config import RunConfig, model_options
from ..cost import count_parameters, measure_flops
from ..data import seed_globally

# Ratios of the channel mixers are tried between these multiples of the model's own.
_RATIOS = (0.25, 4.0)
_NEAREST = 4  # widths for which ratios are tried


@dataclass
class Matched:
    """What the search found.

    Attributes:
        count: of the arm as it will be trained.
        target: of the reference arm.
        own: of the arm at the model's own width.
        within: whether the two differ by no more than the tolerance.
        settings: entries of the model's configuration that changed, for `model.KEY=VALUE`.
        why: why the arm cannot be matched; empty where it is.
    """

    count: int
    target: int
    own: int
    within: bool
    settings: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def difference(self) -> float:
        """(count - target) / target."""
        return self.count / self.target - 1


def count(config: RunConfig, task: Task, by: str) -> int:
    """Parameters, or FLOPs of one sample, of a configuration's model.

    Args:
        config: of the run.
        task: opened.
        by: "parameters" or "flops".

    Raises:
        ConfigError: a model that cannot be built.
    """
    options = model_options(config, task.model_kwargs())
    if by == "parameters":
        with torch.device("meta"):
            return count_parameters(create_model(config.model, **options))
    seed_globally(0, "count")
    return measure_flops(create_model(config.model, **options).eval(), *task.example(1))


class _Counter:
    """Counts by settings, each once; None where the model cannot be built."""

    def __init__(self, config: RunConfig, task: Task, by: str) -> None:
        self.config, self.task, self.by = config, task, by
        self.known: dict[str, int | None] = {}
        self.refusal = ""

    def __call__(self, settings: dict[str, Any]) -> int | None:
        key = repr(settings)
        if key not in self.known:
            model = {**copy.deepcopy(self.config.model), **settings}
            try:
                self.known[key] = count(replace(self.config, model=model), self.task, self.by)
            except ConfigError as error:
                self.refusal, self.known[key] = str(error), None
        return self.known[key]


def _widths(own: int | list[int], step: int) -> Iterator[tuple[float, Any]]:
    """Widths, all stages by one factor, as multiples of `step`; from the own one outwards, with the factor."""
    first = own if isinstance(own, int) else min(own)
    seen: set[str] = set()
    number = 64 * 4
    for i in range(1, number):
        factor = i * step / first
        if not 1 / 8 <= factor <= 8:
            continue
        if isinstance(own, int):
            width: Any = i * step
        else:
            width = [max(step, round(w * factor / step) * step) for w in own]
        if repr(width) not in seen:
            seen.add(repr(width))
            yield factor, width
    if not isinstance(own, int):  # finer: stages by factors that only some of them follow
        for i in range(1, number):
            factor = i * step / max(own)
            width = [max(step, round(w * factor / step) * step) for w in own]
            if 1 / 8 <= factor <= 8 and repr(width) not in seen:
                seen.add(repr(width))
                yield factor, width


def _nearest_widths(counter: _Counter, key: str, own: Any, step: int, target: int) -> list[tuple[int, dict[str, Any]]]:
    """Widths with the counts around the target, nearest first."""
    widths = sorted(_widths(own, step), key=lambda pair: pair[0])
    if not widths:
        return []
    # the count grows with the width: find where it passes the target, then look at what is around
    low, high = 0, len(widths) - 1
    while low < high:
        middle = (low + high) // 2
        at = next((i for i in range(middle, high + 1) if counter({key: widths[i][1]}) is not None), None)
        if at is None:
            high = middle
            continue
        value = counter({key: widths[at][1]})
        if value is not None and value < target:
            low = at + 1
        else:
            high = middle
    found: list[tuple[int, dict[str, Any]]] = []
    for side in (range(low - 1, -1, -1), range(low, len(widths))):
        taken = 0
        for i in side:
            value = counter({key: widths[i][1]})
            if value is not None:
                found.append((value, {key: widths[i][1]}))
                taken += 1
            if taken == _NEAREST:
                break
    return sorted(found, key=lambda pair: abs(pair[0] - target))


def _with_ratio(channel_mixer: Any, factor: float) -> Any:
    """The channel mixers with their ratio multiplied; None where none has one."""
    if isinstance(channel_mixer, list):
        parts = [_with_ratio(part, factor) for part in channel_mixer]
        return [new or old for new, old in zip(parts, channel_mixer, strict=True)] if any(parts) else None
    if channel_mixer is None:
        return None
    spec = {"name": channel_mixer} if isinstance(channel_mixer, str) else dict(channel_mixer)
    allowed = keyword_options(CHANNEL_MIXERS.entries[spec["name"]], CHANNEL_MIXERS.reserved)
    if "ratio" not in allowed or spec.get("hidden") is not None:
        return None
    own: Any = spec.get("ratio", allowed["ratio"].default)
    return {**spec, "ratio": round(own * factor, 5)}


def _tune_ratio(
    counter: _Counter, settings: dict[str, Any], channel_mixer: Any, target: int, tolerance: float
) -> tuple[int, dict[str, Any]] | None:
    """The ratio at which the count comes nearest; it grows linearly with the ratio, up to rounding."""

    def at(factor: float) -> tuple[int, dict[str, Any]] | None:
        tried = {**settings, "channel_mixer": _with_ratio(channel_mixer, factor)}
        value = counter(tried)
        return None if value is None else (value, tried)

    one, two = at(1.0), at(2.0)
    if one is None or two is None or one[0] == two[0]:
        return None
    exact = 1 + (target - one[0]) / (two[0] - one[0])
    tries = [at(exact * (1 + nudge)) for nudge in (0, 0.01, -0.01, 0.03, -0.03) if _RATIOS[0] <= exact <= _RATIOS[1]]
    best = min((t for t in tries if t is not None), key=lambda t: abs(t[0] - target), default=None)
    return best if best is not None and abs(best[0] / target - 1) <= tolerance else None


def match(
    config: RunConfig, task: Task, target: int, *, by: str = "parameters", tolerance: float = 0.02, step: int = 4
) -> Matched:
    """Change the model's width until its count is that of the reference.

    All stages grow by one factor. Widths are multiples of `step`; where none of them comes near enough (heads of a
    fixed width allow few), the ratio of the channel mixers takes the rest, and where there is none, widths are
    multiples of 1.

    Args:
        config: of the arm, at the model's own width.
        task: opened.
        target: the reference's count.
        by: "parameters" or "flops".
        tolerance: relative difference that is allowed.
        step: see above.

    Returns:
        The arm's settings; the nearest ones, and why there are none better, if the tolerance cannot be kept.

    Raises:
        ConfigError: the model cannot be built as it is.
    """
    own = count(config, task, by)
    if abs(own / target - 1) <= tolerance:
        return Matched(own, target, own, True)
    model = model_config(config.model)
    key = "dims" if "dims" in model else "dim"
    counter, found = _Counter(config, task, by), []
    for size in dict.fromkeys((step, 1)):
        nearest = _nearest_widths(counter, key, model[key], size, target)
        found += nearest
        if nearest and abs(nearest[0][0] / target - 1) <= tolerance:
            return Matched(nearest[0][0], target, own, True, nearest[0][1])
        if _with_ratio(model.get("channel_mixer"), 1.0) is None:
            continue
        for _, settings in nearest[:_NEAREST]:
            tuned = _tune_ratio(counter, settings, model["channel_mixer"], target, tolerance)
            if tuned is not None:
                return Matched(tuned[0], target, own, True, tuned[1])
    if not found:
        return Matched(own, target, own, False, {}, f"no other width can be built: {counter.refusal}")
    value, settings = min(found, key=lambda pair: abs(pair[0] - target))
    if abs(own - target) <= abs(value - target):
        value, settings = own, {}
    names = "widths" + (" and ratios of the channel mixers" if model.get("channel_mixer") else "")
    why = f"of the {names} that can be built none is within {tolerance:.0%}; the nearest is {value / target - 1:+.1%}"
    if counter.refusal:
        why += f". Other widths are refused, e.g.: {counter.refusal}"
    return Matched(value, target, own, False, settings, why)

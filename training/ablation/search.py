"""Search beyond a grid: Optuna over the pattern of mixers and the width, under a limit of cost.

    python train.py search.mixers=[attention,mamba2] search.slots=4 search.widths=[32,64] search.limit=100000 task=...

The study lies in SQLite in the search's folder. Several processes started with the same command share it, and a search
that was killed goes on: trials are runs as any other, found again by their identity.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, OptionError, unknown
from ...models import create_model, model_config
from ...schema import Positive, Seed, Size, build_dataclass
from .. import run_folder as report
from ..cli.compose import compose_config, parse_overrides
from ..cli.program import program
from ..config import RunConfig, code_version, identity, model_options, run_name
from ..cost import count_parameters, measure_activation_bytes, measure_flops
from ..identity import tells
from ..loop import DivergedError
from ..quoting import literal
from ..run import run
from .locks import try_lock
from .plan import QUIET, once, open_data

_STUDY = "study.db"


@dataclass(kw_only=True)
class Search:
    """What is searched.

    Attributes:
        mixers: names of mixers, or of their configurations in `configs/mixer`.
        slots: length of the pattern, which repeats to the model's depth (or is one per stage).
        widths: of the model (`dim`, or the first of `dims`, which scale alike); empty for the model's own.
        cost: what is limited: "parameters", "flops" or "activation_bytes" (of one sample).
        limit: largest cost; None for no limit. What is over it is not trained.
        trials: models that are tried, those over the limit included.
        sampler_seed: of Optuna's sampler; None draws differently in each process, as several should.
        name: of the study and its folder.
    """

    mixers: list[str]
    slots: Size = 2
    widths: list[Size] | None = None
    cost: Literal["parameters", "flops", "activation_bytes"] = "parameters"
    limit: Positive | None = None
    trials: Size = 20
    sampler_seed: Seed | None = None
    name: str = "search"

    def __post_init__(self) -> None:
        if not self.mixers:
            raise OptionError("mixers", "at least one mixer is needed.")


def from_command_line(overrides: Sequence[str]) -> tuple[Search, list[str]]:
    """The search of `search.KEY=VALUE ...`, and the settings of all of its runs.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    values: dict[str, Any] = {}
    base = []
    for override, text in zip(parse_overrides(overrides), overrides, strict=True):
        key = str(override.key_or_group)
        if key.startswith("search."):
            option = key.removeprefix("search.")
            if option not in {f.name for f in fields(Search)}:
                raise unknown("search", option, [f.name for f in fields(Search)])
            values[option] = override.value()
        elif key in ("mixer", "resume", "run_dir", "model.mixer"):
            raise ConfigError(f"{key}: a search sets this itself; search.mixers chooses among mixers.")
        else:
            base.append(text)
    return build_dataclass(Search, values, key="search"), once(base)


def _scaled(own: int | Sequence[int], width: int) -> Any:
    if isinstance(own, int):
        return width
    return [max(1, round(w * width / own[0])) for w in own]


class Objective:
    """Trains the model of a trial; its value is the best one on validation.

    Args:
        search: what is searched.
        base: settings of all runs.
    """

    def __init__(self, search: Search, base: Sequence[str]) -> None:
        self.search, self.base, self.code = search, list(base), code_version()
        first = compose_config([*self.base, *QUIET])
        self.task, self.data = open_data(first)
        self.output, model = Path(first.output_dir), model_config(first.model)
        self.width_key = "dims" if "dims" in model else "dim"
        self.own_width = model[self.width_key]
        self.metric = self.task.metric
        self.direction: Literal["maximize", "minimize"] = "maximize" if self.task.higher_is_better else "minimize"

    @property
    def folder(self) -> Path:
        """Of the search."""
        return self.output / f"search-{self.search.name}"

    def settings(self, mixers: Sequence[str], width: int | None) -> list[str]:
        """The command line of a model, without the seed."""
        chosen = [str(m) for m in mixers]
        done = [*self.base]
        if len(set(chosen)) == 1:
            done.append(f"mixer={chosen[0]}")
        else:
            done.append(f"model.mixer={literal([self._spec(name) for name in chosen])}")
        if width is not None:
            done.append(f"model.{self.width_key}={literal(_scaled(self.own_width, width))}")
        return once(done)

    def _spec(self, name: str) -> Any:
        mixer = compose_config([*self.base, *QUIET, f"mixer={name}"]).mixer
        return name if mixer is None else {k: v for k, v in mixer.items() if v is not None}

    def cost(self, config: RunConfig) -> int:
        """Of one model, as `search.cost` says."""
        model = create_model(config.model, **model_options(config, self.task.model_kwargs())).eval()
        if self.search.cost == "parameters":
            return count_parameters(model)
        count = measure_flops if self.search.cost == "flops" else measure_activation_bytes
        return count(model, *self.task.example(1))

    def __call__(self, trial: Any) -> float:
        import optuna

        names = self.search.mixers
        mixers = [str(trial.suggest_categorical(f"mixer_{i}", names)) for i in range(self.search.slots)]
        widths = self.search.widths
        width = int(trial.suggest_categorical("width", widths)) if widths else None
        settings = self.settings(mixers, width)
        trial.set_user_attr("settings", settings)
        try:
            config = compose_config([*settings, *QUIET])
            cost = self.cost(config)
        except ConfigError as error:
            trial.set_user_attr("why", str(error))
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("cost", cost)
        if self.search.limit is not None and cost > self.search.limit:
            trial.set_user_attr("why", f"{self.search.cost} {cost:,} > {self.search.limit:,.0f}")
            raise optuna.TrialPruned("over the limit")
        try:
            summary = self._run(config)
        except DivergedError as error:
            trial.set_user_attr("why", str(error))
            raise optuna.TrialPruned("diverged") from error
        trial.set_user_attr("folder", str(run_name(config, summary["identity"])))
        return float(summary["best"]["value"])

    def _run(self, config: RunConfig) -> dict[str, Any]:
        config = replace(config, resume="auto")
        identifier = identity(config, self.code, tells(self.data))
        while True:
            with try_lock(self.output / ".locks" / identifier) as mine:
                if mine:
                    return run(config, task=self.task, code=self.code, data=self.data, quiet=True)
            time.sleep(2)  # another process trains the same model: its result counts for both


def make_study(search: Search, objective: Objective) -> Any:
    """The study in the search's folder, made or continued.

    Raises:
        ConfigError: Optuna is not installed, or the study in the folder is of another search.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("search: needs optuna, which is not installed: pip install 'mixerzoo[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objective.folder.mkdir(parents=True, exist_ok=True)
    # a process that dies stops its heartbeat; the trial it was at counts as failed, and another one is made
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(objective.folder / _STUDY).resolve()}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=10,
        grace_period=30,
    )
    sampler = optuna.samplers.TPESampler(seed=search.sampler_seed, constant_liar=True, n_startup_trials=5)
    study = optuna.create_study(
        storage=storage, sampler=sampler, study_name=search.name, direction=objective.direction, load_if_exists=True
    )
    about = {"mixers": search.mixers, "slots": search.slots, "widths": search.widths, "cost": search.cost}
    about |= {"limit": search.limit, "base": objective.base, "data": objective.data["sha256"]}
    known = study.user_attrs.get("about")
    if known is not None and known != about:
        other = [key for key in about if known.get(key) != about[key]]
        raise ConfigError(
            f"search.name: {objective.folder} holds another search (other {', '.join(other)}); give this one another "
            "name."
        )
    if known is None:
        study.set_user_attr("about", about)
    return study


def table(search: Search, objective: Objective, study: Any) -> str:
    """The trials as Markdown, best first."""
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    done.sort(key=lambda t: t.value, reverse=objective.direction == "maximize")
    lines = [
        f"# Search {search.name}",
        "",
        f"| validation {objective.metric} | {search.cost} | model |",
        "|---|---|---|",
    ]
    seen: set[str] = set()
    for trial in done:
        command = " ".join(trial.user_attrs["settings"])
        if command not in seen:
            seen.add(command)
            mixers = ", ".join(str(trial.params[f"mixer_{i}"]) for i in range(search.slots))
            width = f", width {trial.params['width']}" if "width" in trial.params else ""
            lines.append(f"| {trial.value:.4f} | {trial.user_attrs['cost']:,} | {mixers}{width} |")
    skipped = [t.user_attrs.get("why", "") for t in study.trials if t.state.name == "PRUNED"]
    lines += ["", f"{len(seen)} models trained, {len(skipped)} trials without training."]
    lines += [f"- {why}" for why in dict.fromkeys(skipped)]
    if done:
        command = f"{program()} {shlex.join(done[0].user_attrs['settings'])}"
        lines += ["", "The best one again:", "", f"    {command}"]
    return "\n".join(lines) + "\n"


def search(overrides: Sequence[str]) -> int:
    """Run, or go on with, the search of a command line; returns the exit code.

    Raises:
        ConfigError: a mistake in it.
        loop.Interrupted: a signal came; the same command goes on.
    """
    wanted, base = from_command_line(overrides)
    objective = Objective(wanted, base)
    for name in wanted.mixers:
        compose_config([*base, *QUIET, f"mixer={name}"])
    study = make_study(wanted, objective)
    from optuna.trial import TrialState

    over = (TrialState.COMPLETE, TrialState.PRUNED)

    def say(study: Any, trial: Any) -> None:
        count = len(study.get_trials(deepcopy=False, states=over))
        value = f"{trial.value:.4f}" if trial.value is not None else trial.user_attrs.get("why", trial.state.name)
        print(f"trial {trial.number}, {count} of {wanted.trials}: {trial.params}: {value}", flush=True)
        if count >= wanted.trials:
            study.stop()

    while len(study.get_trials(deepcopy=False, states=over)) < wanted.trials:
        study.optimize(objective, n_trials=1, callbacks=[say])
    path = objective.folder / "search.md"
    report.write_atomically(path, table(wanted, objective, study))
    print(f"{path}")
    return 0

"""The command `train.py`, also installed as `mixerzoo-train`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError
from .program import program
from .verb import stop_printing

# Hydra answers these itself.
_HYDRA_FLAGS = ("--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")


def _complain(error: ConfigError) -> None:
    rank = os.environ.get("RANK")
    print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr)


def _resume_path(overrides: Sequence[str]) -> str | None:
    """The folder of `resume=FOLDER`, if that is what is asked.

    Raises:
        ConfigError: other settings beside it; a continued run keeps its own.
    """
    from .compose import parse_overrides

    given = [text for text in overrides if text.startswith("resume=")]
    value = parse_overrides(given[-1:])[0].value() if given else None
    if value in (None, "auto", ""):
        return None
    others = [text for text in overrides if not text.startswith(("resume=", "progress=", "tracker="))]
    if others:
        raise ConfigError(
            f"resume: a continued run keeps its own configuration; leave out {', '.join(others)}. "
            "(resume=auto takes the whole command line of the run instead.)"
        )
    return str(value)


def _resumed(folder: str, overrides: Sequence[str]) -> Any:
    from pathlib import Path

    from ...plugins import load_kept
    from ..config import parse
    from ..run_folder import read_config
    from .compose import parse_overrides

    values = read_config(Path(folder)) | {"resume": folder}
    values["plugins"] = load_kept(Path(folder))  # the code that it began with, whatever became of the files
    for override in parse_overrides(overrides):
        if override.key_or_group in ("progress", "tracker"):
            values[override.key_or_group] = override.value()
    return parse(values)


def _show(arguments: Sequence[str]) -> int:
    """What Hydra shows of a configuration; `--cfg job` is that of the run, or of every run of a sweep."""
    from omegaconf import OmegaConf

    from .compose import composed, put_in_place, register_groups, rewrite, sweep_jobs

    joined = " ".join(arguments).replace("--cfg=", "--cfg ").replace("-c=", "--cfg ")
    wants = "--cfg job" in joined or "-c job" in joined
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    rest = [a for a in arguments if a not in overrides]
    for text in overrides:
        if text.startswith(("ablation=", "ablation.", "claim=", "search.")):
            raise ConfigError(f"{text}: --cfg and the like show the configuration of runs; leave this out.")
    rewritten = rewrite(overrides)
    register_groups(rewritten)
    sweep = "-m" in rest or "--multirun" in rest
    jobs = (sweep_jobs(rewritten) if sweep else None) or [rewritten]
    if not wants:
        if not sweep:
            composed(rewritten)  # what is wrong is said our way
        _hydra([a for a in rest if a not in ("-m", "--multirun")] + (jobs[0] if sweep else rewritten), [])
        return 0
    for job in jobs:
        config, _ = composed(job)
        put_in_place(config, job)
        if len(jobs) > 1:
            print(f"# {' '.join(job)}")
        print(OmegaConf.to_yaml(config, resolve="--resolve" in rest))
    return 0


def _start(arguments: Sequence[str]) -> int:
    from .compose import compose_rewritten, register_groups, rewrite

    overrides = [a for a in arguments if not a.startswith("-")]
    flags = [a for a in arguments if a.startswith("-")]
    if any(flag in ("--help", "-h") for flag in flags):
        from .help import print_help

        try:
            print_help(overrides)
            sys.stdout.flush()
        except BrokenPipeError:
            stop_printing()
        return 0
    if any(flag.split("=")[0] in _HYDRA_FLAGS for flag in flags):
        return _show(arguments)
    for flag in flags:
        if flag not in ("-m", "--multirun"):
            raise ConfigError(
                f"{flag}: there is no such option. Settings are written key=value; -m runs a sweep; --help shows all."
            )
    swept = flags and not any(text.startswith(("hydra/", "+hydra", "hydra.", "search.")) for text in overrides)
    if swept or any(text.startswith(("ablation=", "ablation.", "claim=")) for text in overrides):
        from ..ablation.sweep import main as ablate

        return ablate(overrides)
    if any(text.startswith("search.") for text in overrides):
        from ..ablation.search import search

        return search(overrides)
    folder = _resume_path(overrides)
    if folder is not None:
        from ..run import run

        run(_resumed(folder, overrides))
        return 0
    rewritten = rewrite(overrides)
    register_groups(rewritten)
    failures: list[ConfigError] = []
    if not flags:
        compose_rewritten(rewritten)
        _hydra(rewritten, failures)
    elif any(text.lstrip("+").startswith("hydra/sweeper=") for text in overrides):  # who knows what it will run
        _hydra([*flags, *rewritten], failures)
    else:
        from ..ablation.display import SweepDisplay
        from ..ablation.plan import make_plan, write_plan
        from ..ablation.preset import from_command_line
        from ..ablation.sweep import conclude

        plan = make_plan(from_command_line([a for a in overrides if not a.lstrip("+").startswith("hydra")]))
        _hydra([*flags, *rewritten], failures)  # by another launcher than ours
        write_plan(plan)
        conclude(plan, SweepDisplay(plan, enabled=True))
    return 2 if failures else 0


def _hydra(arguments: list[str], failures: list[ConfigError]) -> None:
    """Hand over to Hydra, which composes again and runs once, or once per combination of a sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from ..config import CONFIGS
    from ..run import run
    from .compose import finalise

    def job(config: Any) -> float | None:
        settings = HydraConfig.get()
        try:
            summary = run(finalise(config, dict(settings.runtime.choices), list(settings.overrides.task)))
        except ConfigError as error:  # one run that fails does not take the rest of a sweep with it
            _complain(error)
            failures.append(error)
            return None
        return summary["value"]

    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")(job)()
    finally:
        sys.argv = before


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake of the user or a loss that is not finite, 130/143 interrupted.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    from ..loop import Interrupted
    from ..quoting import argument

    try:
        code = _start(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        _complain(error)
        code = 2
    except Interrupted as stop:
        given = sys.argv[1:] if arguments is None else arguments
        whole = any(a in ("-m", "--multirun") or a.startswith(("ablation", "claim=", "search.")) for a in given)
        again = "the same command" if whole else f"{program()} {argument('resume', stop.folder)}"
        print(f"stopped at step {stop.step} and saved. Continue with: {again}", file=sys.stderr)
        code = 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)

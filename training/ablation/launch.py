"""Several processes for one ablation: on this machine (joblib), on a cluster (Ray), under Slurm (submitit).

Every worker is the command `train.py ablation.worker=FOLDER` in the folder where the ablation was started: it reads the
plan, takes runs that nobody else holds, and ends when all are done. So a launcher only starts processes, and one that
dies costs the run it was at. All workers must see the same files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import plugins
from ...errors import ConfigError
from ..config import PACKAGE
from .plan import Plan


def worker_command(plan: Plan) -> list[str]:
    """The command of one worker."""
    return [sys.executable, str(PACKAGE / "train.py"), f"ablation.worker={plan.folder.resolve()}"]


def worker_threads(plan: Plan) -> int:
    """Threads of one worker: as set, else a fair share of this machine's cores."""
    return plan.ablation.threads or max(1, (os.cpu_count() or 1) // plan.ablation.workers)


def _runner(plan: Plan) -> Callable[[], tuple[int, str]]:
    """A function that runs one worker to its end, and needs nothing of this package where it is unpickled."""
    command, folder, threads = worker_command(plan), str(Path.cwd()), str(worker_threads(plan))
    # the processes of a cluster have an environment of their own
    outside = {key: os.environ[key] for key in (plugins.ENVIRONMENT,) if key in os.environ}

    def run_worker() -> tuple[int, str]:
        import os
        import subprocess

        environment = {**os.environ, **outside, "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return done.returncode, done.stderr.decode(errors="replace")[-2000:]

    return run_worker


def _missing(package: str, launcher: str) -> ConfigError:
    return ConfigError(
        f"ablation.launcher: {launcher} needs the package {package}, which is not installed: pip install {package}"
    )


def _joblib(plan: Plan) -> list[tuple[int, str]]:
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise _missing("joblib", "joblib") from error
    # the processes are the workers' own; what waits for them here can be threads
    workers, run_worker = Parallel(n_jobs=plan.ablation.workers, backend="threading"), _runner(plan)
    done: Any = workers(delayed(run_worker)() for _ in range(plan.ablation.workers))
    return list(done)


def _ray(plan: Plan) -> list[tuple[int, str]]:
    try:
        import ray  # pyright: ignore[reportMissingImports] - optional, and large
    except ImportError as error:
        raise _missing("ray", "ray") from error
    started = not ray.is_initialized()
    if started:
        ray.init(**{"log_to_driver": False, "include_dashboard": False, **plan.ablation.launcher_options})
    try:
        remote = ray.remote(_runner(plan)).options(num_cpus=worker_threads(plan))
        return ray.get([remote.remote() for _ in range(plan.ablation.workers)])
    finally:
        if started:
            ray.shutdown()


def make_executor(plan: Plan) -> Any:
    """submitit's executor with the settings of `ablation.launcher_options`; `cluster` is "slurm" unless given.

    Raises:
        ConfigError: submitit is not installed, or refuses an option.
    """
    try:
        import submitit
    except ImportError as error:
        raise _missing("submitit", "submitit") from error
    options = dict(plan.ablation.launcher_options)
    cluster = options.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=str(plan.folder / "submitit"), cluster=cluster)
        executor.update_parameters(
            **{"name": f"mixerzoo-{plan.ablation.name}", "cpus_per_task": worker_threads(plan), "tasks_per_node": 1}
            | options
        )
    except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
        raise ConfigError(
            f"ablation.launcher_options: submitit refuses {plan.ablation.launcher_options}: {error}"
        ) from error
    return executor


def _submitit(plan: Plan) -> list[tuple[int, str]]:
    executor, run_worker = make_executor(plan), _runner(plan)
    with executor.batch():
        jobs = [executor.submit(run_worker) for _ in range(plan.ablation.workers)]
    return [job.result() for job in jobs]


LAUNCHERS: dict[str, Callable[[Plan], list[tuple[int, str]]]] = {
    "joblib": _joblib,
    "ray": _ray,
    "submitit": _submitit,
}


def launch(plan: Plan) -> list[str]:
    """Run `ablation.workers` workers by the launcher to their end; returns what those that failed said.

    Args:
        plan: written.

    Raises:
        ConfigError: the launcher's package is missing or refuses its options.
    """
    results = LAUNCHERS[plan.ablation.launcher](plan)
    return [f"a worker ended with {code}: {said}" for code, said in results if code]

"""Ablations from Python: a table of arms, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, unknown
from ...mixers import list_mixers
from ...models import list_models
from ..config import CONFIGS
from ..quoting import literal
from .preset import Ablation, arm_name
from .report.text import results_csv
from .sweep import ablate

if TYPE_CHECKING:
    import pandas as pd

Arm = str | Mapping[str, Any] | Sequence[str]


def _arm(arm: Arm) -> tuple[str, dict[str, Any]]:
    """An arm as (name, settings)."""
    if isinstance(arm, str):
        if arm in list_mixers() or (CONFIGS / "mixer" / f"{arm}.yaml").exists():
            return arm, {}
        if arm in list_models():
            return arm, {"model": arm, "mixer": None}
        known = [*list_mixers(), *(path.stem for path in (CONFIGS / "mixer").glob("*.yaml")), *list_models()]
        raise unknown("models_or_configs", arm, known)
    if isinstance(arm, Mapping):
        settings = {
            ("mixer" if key == "name" else f"mixer.{key}" if "name" in arm else key): v for key, v in arm.items()
        }
        if "mixer" not in settings:
            settings["mixer"] = None
        options = [f"{k.removeprefix('mixer.')}={v}" for k, v in settings.items() if k != "mixer" and v is not None]
        return "-".join([str(settings["mixer"] or settings.get("model") or "own"), *options]), settings
    return arm_name("[" + ",".join(map(str, arm)) + "]"), {"mixer": list(arm)}


def compare(
    models_or_configs: Sequence[Arm] | Mapping[str, Arm],
    task: str,
    *,
    model: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    lr: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
    reference: str | None = None,
    match: str = "parameters",
    costs: bool = True,
    output_dir: str | Path = "runs",
    progress: bool = True,
) -> pd.DataFrame:
    """Train several mixers or models on a task, fairly, and return their scores and costs.

    The same as `train.py ablation.*`: runs that exist are not repeated, and the report is written; `attrs["folder"]` of
    the table is where.

    Args:
        models_or_configs: arms, each a mixer's or a model's name; a mapping of a mixer (`{"name": "attention",
            "head_dim": 16}`) or of settings as on the command line (`{"mixer": "attention", "model.dim": 64}`); or a
            list of mixers, a pattern over the layers. In a mapping the keys name the arms.
        task: by name.
        model: backbone by name, for arms that are mixers; by default that of `train.py`.
        seeds: of the runs.
        lr: learning rates of which the best on validation counts; by default the optimizer's own.
        settings: further settings of all runs, e.g. `{"train.epochs": 5}`.
        reference: arm that the others are matched to and compared with; by default the first.
        match: "parameters", "flops" or "off".
        costs: measure throughput, memory and decoding.
        output_dir: where runs are written.
        progress: show how far it is.

    Returns:
        One row per arm, best first, with the columns of `results.csv`.

    Raises:
        ConfigError: pandas is not installed, or a setting that does not fit.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("compare: needs pandas, which is not installed: pip install 'mixerzoo[sweep]'") from error
    if isinstance(models_or_configs, Mapping):
        arms = {name: _arm(arm)[1] or {"mixer": arm} for name, arm in models_or_configs.items()}
    else:
        arms = dict(_arm(arm) for arm in models_or_configs)
        if len(arms) < len(models_or_configs):
            raise ConfigError("models_or_configs: two arms are the same.")
    base = [f"task={task}", *([f"model={model}"] if model else [])]
    base += [f"{key}={literal(value)}" for key, value in (settings or {}).items()]
    base.append(f"output_dir={literal(str(output_dir))}")
    ablation = Ablation(
        name=f"compare-{task}",
        title=f"Comparison on {task}",
        base=base,
        arms=arms,
        reference=reference,
        seeds=list(seeds),
        lr=[float(rate) for rate in lr],
        match=match,  # type: ignore[arg-type]
        costs=costs,
    )
    if match not in ("parameters", "flops", "off"):
        raise unknown("match", match, ("parameters", "flops", "off"))
    if reference is not None and reference not in arms:
        raise unknown("reference", reference, arms)
    results = ablate(ablation, progress=progress)
    if not results:
        raise ConfigError("compare: another process is at the same comparison; try again when it is done.")
    table = pd.read_csv(StringIO(results_csv(results))).set_index("arm")
    table = table.sort_values("mean", ascending=not results["higher_is_better"])
    table.attrs["folder"] = results["folder"]
    return table

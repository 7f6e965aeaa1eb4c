"""Train a model: `python train.py model=... mixer=... task=...`, or `mixerzoo-train ...` where it is installed.

`python train.py --help` shows all settings; `configs/train.yaml` explains them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def _use_this_checkout() -> None:
    """Make `mixerzoo` the folder of this file, installed or not, whatever else is installed under this name."""
    root = Path(__file__).resolve().parent
    # this folder holds packages named `tasks` or `models`; none of them is meant to be a top-level one
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = importlib.util.spec_from_file_location(
        "mixerzoo", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{root} does not hold the package mixerzoo")
    package = importlib.util.module_from_spec(spec)
    sys.modules["mixerzoo"] = package
    spec.loader.exec_module(package)


# Before torch is loaded: threads of small models that wait by spinning made training ten times slower (19 instead of
# 160 images/s) on 2 cores that other processes used, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ in ("__main__", "__mp_main__") and not __package__:  # __mp_main__: a worker process that was spawned
    _use_this_checkout()


def main() -> None:
    """Entry point of the console script."""
    # resolved at run time: the package is this folder under another name
    from mixerzoo.training.cli.main import main as command  # pyright: ignore[reportMissingImports]

    command()


if __name__ == "__main__":
    main()

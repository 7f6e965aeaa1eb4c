"""What the self-test found on this card, and which ops therefore run without Triton.

The outcome lies in the cache folder, by card, version of Triton and the code of the kernels. `auto` asks here; a
backend asked for by name does not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import unknown
from ..constant import constant_result

KERNELS = Path(__file__).resolve().parent.parent
AVOID = "MIXERZOO_AVOID_TRITON"
_log = logging.getLogger("mixerzoo.kernels")


def folder() -> Path:
    """Where outcomes lie: `$MIXERZOO_CACHE`, else `$XDG_CACHE_HOME/mixerzoo`, else `~/.cache/mixerzoo`."""
    if root := os.environ.get("MIXERZOO_CACHE"):
        return Path(root) / "selftest"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixerzoo" / "selftest"


def card() -> str:
    """The name of the current GPU, or "interpreter"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


@functools.cache
def code() -> str:
    """A hash of the kernels' sources: another version of the package, or an edit, asks for another test."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def path() -> Path:
    """The file of this card, Triton and code."""
    import triton

    name = "_".join([card(), f"triton{triton.__version__}", code()])
    return folder() / (re.sub(r"[^\w.]+", "-", name) + ".json")


def load() -> dict[str, str] | None:
    """By op, what failed ("" for nothing); None where the test was never run."""
    try:
        return json.loads(path().read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # the second: cut off while it was written
        return None


def store(verdicts: Mapping[str, str]) -> Path:
    """Keep verdicts, beside those of other ops; returns the file."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({**(load() or {}), **verdicts}, indent=1))
    part.replace(file)
    forget()
    return file


def forget() -> None:
    """Read the outcome again when it is asked for next, and say again what is said once."""
    _known.cache_clear()
    _say.cache_clear()


@functools.cache
def _known() -> dict[str, str] | None:
    return load()


@functools.cache
def _say(message: str, level: int) -> None:
    """Once."""
    if level == logging.WARNING:
        warnings.warn(message, RuntimeWarning, stacklevel=5)
    else:
        _log.log(level, message)


@constant_result
def avoided(op: str) -> bool:
    """Whether `auto` must not take Triton for an op: the self-test failed, or `MIXERZOO_AVOID_TRITON` names it.

    Raises:
        ConfigError: when the variable names what is no op.
    """
    names = [name.strip() for name in os.environ.get(AVOID, "").split(",") if name.strip()]
    if names:
        folders = [p.parent.name for p in KERNELS.glob("*/cases.py")]
        allowed = [*folders, *(f"{f}_step" for f in folders)]
        for name in names:
            if name not in allowed:
                raise unknown(AVOID, name, allowed)
        if op in names:
            return True
    known = _known()
    if known is None:
        _say(
            f"The kernels were never tested on this card ({card()}). `python -m mixerzoo.kernels.selftest` does it in "
            "minutes.",
            logging.INFO,
        )
        return False
    if not known.get(op):
        return False
    _say(
        f"{op}: its Triton kernels failed the self-test on this card ({known[op]}), so that it runs in PyTorch. Run "
        f"`python -m mixerzoo.kernels.selftest --op {op}` again after a change of driver or versions.",
        logging.WARNING,
    )
    return True

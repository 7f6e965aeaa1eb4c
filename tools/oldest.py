"""The lowest versions that pyproject.toml allows, as constraints for pip: `python tools/oldest.py > lowest.txt`.

Of the direct dependencies alone, the extras' included; what they depend on is the newest that fits them. A lower bound
`>=3.6` is the release 3.6, or 3.6.0, which pip holds for the same.
"""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

LINTERS = ("ruff", "pyright")  # they judge the code, nothing runs by them


def lowest(project: dict) -> list[str]:
    """`name==version` for each requirement of `project` (the table of this name), sorted.

    Raises:
        ValueError: a requirement without a lower bound, or with two different ones.
    """
    found: dict[str, str] = {}
    for line in [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]:
        requirement = line.partition(";")[0].replace(" ", "")
        match = re.match(r"([\w.-]+)(?:\[.*\])?[>=]=([\w.]+)", requirement)
        if match is None:
            raise ValueError(f"{line!r} in pyproject.toml has no lower bound: name>=version, or ==")
        name, version = match.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has the lower bounds {found[name]} and {version} in pyproject.toml")
    return sorted(f"{name}=={version}" for name, version in found.items() if name not in LINTERS)


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    sys.stdout.write("\n".join(lowest(tomllib.loads(text)["project"])) + "\n")

"""Write the report of an ablation, or of any finished runs.

python -m mixerzoo report runs/ablation-recall-1a2b3c4d
python -m mixerzoo report runs/digits-* --out here --reference pooling
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ablation.report.build import main as build


def main(arguments: Sequence[str]) -> int:
    """Hand over to the report's own command line."""
    return build(arguments)

"""Train a model, run a sweep or an ablation; the same as train.py and mixerzoo-train.

python -m mixerzoo train model=poolformer_s12 mixer=attention task=digits
"""

from __future__ import annotations

from collections.abc import Sequence

from ..main import main as train


def main(arguments: Sequence[str]) -> int:
    """Hand over to the command line of training."""
    train(arguments)
    return 0

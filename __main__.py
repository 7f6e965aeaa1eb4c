"""`python -m mixerzoo VERB ...`; `python -m mixerzoo --help` lists the verbs."""

from __future__ import annotations

import sys

from .training.cli.verb import main

if __name__ == "__main__":
    sys.exit(main())

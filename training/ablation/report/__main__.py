"""`python -m mixerzoo.training.ablation.report RUNS...` writes the report of an ablation, or of any runs."""

import sys

from .build import main

sys.exit(main())

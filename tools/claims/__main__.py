"""`python -m mixerzoo.tools.claims`, see `page`."""

import sys

from .page import main

main(sys.argv[1:])

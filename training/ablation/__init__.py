"""Ablations: sweeps over mixers at matched size, their costs, and the report.

What is in this folder decides which runs are made and shows what came out; nothing here changes what a run computes, so
it is not part of a run's identity.
"""

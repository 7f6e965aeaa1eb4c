"""Packaging: the repository root is the package `mixerzoo`, so `mixers/base.py` is `mixerzoo.mixers.base`.

This cannot be said in pyproject.toml without listing every folder by hand.
"""

from setuptools import find_packages, setup

FOLDERS = ["kernels", "mixers", "models", "tasks", "training", "contract"]

setup(
    package_dir={"mixerzoo": "."},
    packages=["mixerzoo"] + [f"mixerzoo.{p}" for p in find_packages(".", include=[f"{f}*" for f in FOLDERS])],
)

"""Packaging: the repository root is the package `mixerzoo`, so `mixers/fourier.py` is `mixerzoo.mixers.fourier`.

This cannot be said in pyproject.toml without listing every folder by hand.
"""

from setuptools import find_packages, setup

FOLDERS = ["kernels", "mixers", "models", "tasks", "training"]

setup(
    package_dir={"mixerzoo": "."},
    packages=["mixerzoo"] + [f"mixerzoo.{p}" for p in find_packages(".", include=[f"{f}*" for f in FOLDERS])],
)

"""What pyproject.toml cannot say: ``kernels/`` is installed as ``ltat_fast.kernels``, and the C++ extension."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ltat_fast", "ltat_fast.*"]), "ltat_fast.kernels"],
    package_dir={"ltat_fast.kernels": "kernels"},
)

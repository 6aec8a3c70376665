"""What pyproject.toml cannot say: folders of the repository's root that the wheel holds inside the package."""

from setuptools import find_namespace_packages, setup

DATA = {f"capacity_gap.{folder}": folder for folder in ("conf", "sweeps", "results")}  # settings/places.py finds them

setup(
    packages=[*find_namespace_packages(include=["capacity_gap*", "hydra_plugins*"]), *DATA],
    package_dir=DATA,
)

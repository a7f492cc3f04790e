"""Two packages from two source roots: `vlmr1` here, `vlmr1_kernels` in kernels/. Metadata: pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(".", include=["vlmr1*"]) + find_packages("kernels", include=["vlmr1_kernels*"]),
    package_dir={"vlmr1_kernels": "kernels/vlmr1_kernels"},
    package_data={"vlmr1": ["recipes/*.yaml", "report/*.css", "tiny/checkpoint/*"]},
    include_package_data=False,
)

"""Where the packages lie. Everything else about the distribution is in pyproject.toml.

``kernels/``, ``configs/`` and ``benchmarks/`` stand at the top of the repository, where their readers look for them,
and are installed as ``dfkd_fast.kernels``, ``dfkd_fast.configs`` and ``dfkd_fast.benchmarks``.
"""

from setuptools import find_packages, setup

MAPPED = ("kernels", "configs", "benchmarks")

packages = find_packages(include=["dfkd_fast", "dfkd_fast.*"])
package_dir = {"dfkd_fast": "dfkd_fast"}
for folder in MAPPED:
    package_dir[f"dfkd_fast.{folder}"] = folder
    packages.append(f"dfkd_fast.{folder}")
    packages.extend(f"dfkd_fast.{folder}.{name}" for name in find_packages(folder))

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "dfkd_fast": ["py.typed"],
        "dfkd_fast.kernels": ["*.json"],
        "dfkd_fast.configs": ["*.yaml", "*/*.yaml"],
        "dfkd_fast.benchmarks": ["results/*/*.json"],
    },
)

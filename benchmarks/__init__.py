"""Measurements: installed as ``dfkd_fast.benchmarks``, run with ``python -m dfkd_fast.benchmarks.<name>``."""

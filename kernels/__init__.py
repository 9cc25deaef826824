"""Triton kernels, one file per op. Installed as ``dfkd_fast.kernels``; only :mod:`dfkd_fast.ops` imports them."""

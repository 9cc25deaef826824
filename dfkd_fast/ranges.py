"""The old name of :mod:`dfkd_fast.nvtx`."""

from dfkd_fast.deprecated import renamed

__getattr__ = renamed(__name__, span="dfkd_fast.nvtx.nvtx_range")

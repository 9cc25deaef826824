"""The ops in plain PyTorch: the definition that every other backend is checked against.

Readable, differentiable any number of times, on any device. Arguments were checked in :mod:`dfkd_fast.ops`.
"""

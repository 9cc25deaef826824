"""The ops in plain PyTorch. They define the ops, and tests check every other backend against them.

They run on any device and support derivatives of any order. :mod:`dfkd_fast.ops` checks their arguments.
"""

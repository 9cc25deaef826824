"""The YAML files of this folder, installed as package data.

``importlib.resources.files("dfkd_fast.configs")`` finds them from a checkout, an editable install and a wheel alike.
"""

"""Packaged YAML configs. ``importlib.resources.files("dfkd_fast.configs")`` finds them in every kind of install."""

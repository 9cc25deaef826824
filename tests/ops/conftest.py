"""Fixtures for op tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(params=["reference", "triton", pytest.param("triton on a GPU", marks=pytest.mark.gpu)])
def backend_and_device(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The reference on the CPU, and Triton kernels in the interpreter and on a GPU."""
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is used only without a GPU (TRITON_INTERPRET=1)")
    return request.param.split()[0], "cuda" if "GPU" in request.param else "cpu"


@pytest.fixture(params=["reference", "cpu", "triton", pytest.param("triton on a GPU", marks=pytest.mark.gpu)])
def every_backend_and_device(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The same, with the backend ``cpu``, for the ops that have it."""
    return backend_and_device.__wrapped__(request)

"""Every CUDA kernel compiles for every architecture, without stack or spills, and the table says what to."""

from __future__ import annotations

import json

import pytest

from dfkd_fast.benchmarks import compile_cuda
from dfkd_fast.benchmarks.compile_cuda import ARCHITECTURES, CSRC, TABLE
from dfkd_fast.doctor import find_nvcc

FILES = sorted(path.name for path in CSRC.glob("*.cu"))
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4dfkd3addIfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN4dfkd3addIfEEvPT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compiling entry function '_ZN4dfkd3subEv' for 'sm_80'
ptxas info    : Function properties for _ZN4dfkd3subEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 360 bytes cmem[0]
"""


def test_the_assemblers_words_are_read() -> None:
    first, second = compile_cuda.parse(LOG)
    assert first == {
        **{"kernel": "_ZN4dfkd3addIfEEvPT_", "arch": "90a", "stack": 8, "spill_stores": 4, "spill_loads": 12},
        **{"registers": 40, "barriers": 1, "static_shared": 2048},
    }
    assert compile_cuda.unsound(first) == "8 bytes of stack, 4 bytes of spill_stores, 12 bytes of spill_loads"
    assert second["registers"] == 12
    assert compile_cuda.unsound(second) is None


def test_the_table_is_of_these_sources() -> None:
    content = json.loads(TABLE.read_text())
    assert content["digest"] == compile_cuda.digest(), "python -m dfkd_fast.benchmarks.compile_cuda --write"
    assert {(row["file"], row["arch"]) for row in content["rows"]} == {(f, a) for f in FILES for a in ARCHITECTURES}
    assert not [row for row in content["rows"] if compile_cuda.unsound(row)]


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("name", FILES)
def test_every_kernel_compiles_for_every_architecture(name: str) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    rows = compile_cuda.compile_file(nvcc, CSRC / name)
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    wrong = {(row["kernel"], row["arch"]): why for row in rows if (why := compile_cuda.unsound(row))}
    assert not wrong

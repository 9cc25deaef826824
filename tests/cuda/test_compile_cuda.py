"""Every CUDA kernel compiles for sm_90a without stack or spills, and the tensor-core kernels contain wgmma."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfkd_fast.benchmarks.ops import compile_cuda
from dfkd_fast.doctor import find_nvcc

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


def test_ptxas_output_is_parsed() -> None:
    first, second = compile_cuda.parse(LOG)
    assert first == {
        **{"kernel": "_ZN4dfkd3addIfEEvPT_", "stack": 8, "spill_stores": 4, "spill_loads": 12},
        **{"registers": 40, "barriers": 1, "static_shared": 2048, "complaints": []},
    }
    assert compile_cuda.unsound(first) == "8 bytes of stack, 4 bytes of spill_stores, 12 bytes of spill_loads"
    assert second["registers"] == 12
    assert compile_cuda.unsound(second) is None


@pytest.mark.parametrize(
    ("warning", "error"),
    [
        ("wgmma.mma_async instructions are serialized due to X in the function '_ZN4dfkd3subEv'", "wgmma serialized"),
        ("wgmma.mma_async instructions are serialized due to Y in function '_ZN4dfkd3subEv'", "wgmma serialized"),
        ("'setmaxnreg' ignored; unable to determine register count at entry.", "setmaxnreg ignored in this file"),
    ],
)
def test_performance_warnings_are_errors(warning: str, error: str) -> None:
    first, second = compile_cuda.parse(f"ptxas info    : (C7511) Potential Performance Loss: {warning}\n{LOG}")
    assert (error in first["complaints"]) == ("setmaxnreg" in error)
    assert compile_cuda.unsound(second) == error


SASS = """\
\t\tFunction : _Z4goodv
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;  /* 0x01e00000041879f0 */
        /*0100*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ; /* 0x01e00000041879f0 */
\t\tFunction : _Z4nonev
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
"""
NVDISASM = """\
//--------------------- .text._Z4goodv --------------------------
\t.section\t.text._Z4goodv,"ax",@progbits
.text._Z4goodv:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0100*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
.text._Z4nonev:
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
"""
PTX = """\
.visible .entry _Z4goodv(
\t.param .u64 .ptr .align 1 _Z4goodv_param_0
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, add, 1, 1, 0, 0;
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, add, 1, 1, 0, 0;
.entry _Z4nonev(
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
"""


@pytest.mark.parametrize("code", [SASS, NVDISASM, PTX], ids=["cuobjdump", "nvdisasm", "PTX"])
def test_wgmma_instructions_are_counted(code: str) -> None:
    assert compile_cuda.count_wgmma(code) == {"_Z4goodv": 2, "_Z4nonev": 0}


@pytest.mark.parametrize(
    ("kernel", "wgmma", "error"),
    [
        ("sums_wgmma<bfloat16, 128>", 8, None),
        ("sums_wgmma<bfloat16, 128>", 0, "no wgmma"),
        ("contrastive::sums_wgmma", 0, "no wgmma"),
        ("_ZN4dfkd10sums_wgmmaEv", 0, "no wgmma"),
        ("prepare<kind_wgmma>", 0, None),
        ("wgmma_parts", 0, None),
    ],
)
def test_kernels_named_wgmma_must_contain_it(kernel: str, wgmma: int, error: str | None) -> None:
    row = {"kernel": kernel, "stack": 0, "spill_stores": 0, "spill_loads": 0, "wgmma": wgmma}
    assert compile_cuda.unsound(row) == error


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("path", compile_cuda.sources(), ids=lambda path: path.name)
def test_every_kernel_compiles(path: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    rows = compile_cuda.compile_file(nvcc, path)
    assert any(row["wgmma"] for row in rows)
    assert not {row["kernel"]: why for row in rows if (why := compile_cuda.unsound(row))}

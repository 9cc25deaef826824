"""Sends launches through Triton's argument binding and C launchers to a stub of the CUDA driver.

The stub needs no GPU and computes nothing: tensors have shapes, strides and an address, but no data. For each launch,
the values that reach ``cuLaunchKernelEx`` are compared with those that Python passed. This module runs as a program,
because it changes how Triton and torch see the machine. It prints JSON:

    TRITON_INTERPRET=0 python -m tests.kernels.stub_driver FOLDER [--arch 90 ...] [--dtype bfloat16 ...] [--compile]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import re
import struct
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton.compiler
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dfkd_fast.benchmarks.ops.cases import BENCHMARKS, Case, Make, Work
from dfkd_fast.benchmarks.ops.compile_kernels import ARCHITECTURES, DTYPES, run_on_meta
from dfkd_fast.kernels import common
from dfkd_fast.kernels.config import shared_memory
from dfkd_fast.ops import custom_op

from ..ops import table

STREAM = 0x57EA

_NUM_SMS, _MAJOR, _MINOR, _SHARED = 16, 75, 76, 97  # values of CUdevice_attribute
_MAX_PARAMS = 512
_HEADER = """
#define PY_SSIZE_T_CLEAN
#include "cuda.h"
#include <Python.h>
"""


class _Launch(ctypes.Structure):
    """``stub_launch`` of stub_cuda.c."""

    _fields_ = (
        ("count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("params", ctypes.c_uint64 * _MAX_PARAMS),
    )


def _address(x: Tensor) -> int:
    """An address for a tensor without data: unique per storage, and aligned like those of CUDA's allocator."""
    storage = x.untyped_storage()
    return 32 * storage._cdata + x.storage_offset() * x.itemsize if storage.nbytes() else 0


class Stub:
    """Builds the stub of the CUDA driver and loads it into this process, where Triton and torch find it.

    Args:
        folder: An empty folder for the build.
    """

    def __init__(self, folder: Path) -> None:
        include = Path(str(nvidia.__file__)).parent / "include"
        path = folder / "libcuda.so.1"
        gcc = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{path.name}", f"-I{include}", "-o", path]
        subprocess.run([*gcc, Path(__file__).with_name("stub_cuda.c")], check=True)
        # Later requests for libcuda.so.1 return this library.
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.launch = _Launch.in_dll(self._library, "stub_launch")
        self.num_params = ctypes.c_int.in_dll(self._library, "stub_num_params")
        self._device = ctypes.c_int.in_dll(self._library, "stub_device")
        self._gcc_flags = ["-O0", "-shared", "-fPIC", f"-I{include}", f"-I{sysconfig.get_paths()['include']}"]
        self._header = folder / "launcher.h"
        self._header.write_text(_HEADER)
        flags = self._gcc_flags[2:]
        subprocess.run(["gcc", "-O0", "-x", "c-header", self._header, *flags, "-o", f"{self._header}.gch"], check=True)
        knobs.nvidia.libcuda_path = str(folder)
        knobs.build.impl = self._build
        self._patch_torch()
        active = nvidia.CudaDriver()
        active.get_current_device = lambda: self._device.value
        active.get_current_stream = lambda device: STREAM
        driver.set_active(active)

    def _build(self, name: str, source: str, folder: str, *_: Any) -> str:
        """Replaces Triton's build of a launcher: faster, without optimization and with precompiled headers."""
        path = f"{folder}/{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run(["gcc", "-include", self._header, source, *self._gcc_flags, "-o", path], check=True)
        return path

    def _patch_torch(self) -> None:
        """Make tensors on the meta device look like tensors on the current CUDA device."""
        torch.Tensor.is_cuda = property(lambda self: True)
        torch.Tensor.data_ptr = _address
        torch.cuda.current_device = lambda: None  # the index of meta tensors' device
        torch.cuda.get_device_capability = lambda index=None: (self.attribute(_MAJOR), self.attribute(_MINOR))
        torch.cuda.get_device_properties = lambda index=None: SimpleNamespace(
            multi_processor_count=self.attribute(_NUM_SMS)
        )
        custom_op._recording = nullcontext()  # operators launch kernels for meta tensors

    def attribute(self, which: int) -> int:
        """An attribute of the current device."""
        value = ctypes.c_int()
        assert self._library.cuDeviceGetAttribute(ctypes.byref(value), which, self._device) == 0
        return value.value

    def use(self, arch: int) -> None:
        """Make the device of an architecture the current one."""
        self._device.value = ARCHITECTURES.index(arch)
        assert 10 * self.attribute(_MAJOR) + self.attribute(_MINOR) == arch
        assert self.attribute(_SHARED) == shared_memory(arch)
        common._capability.cache_clear()
        common._num_sms.cache_clear()


def compile_without_code(src: Any, target: Any, options: dict[str, Any]) -> CompiledKernel:
    """Replaces ``triton.compile``: the result loads and launches like any other, but contains no code."""
    scratch = {f"{which}_scratch_{what}": 0 for which in ("global", "profile") for what in ("size", "align")}
    compiled = CompiledKernel.__new__(CompiledKernel)
    compiled.metadata = SimpleNamespace(**options, **scratch, target=target, name=src.name, shared=0)
    compiled.packed_metadata = make_backend(target).pack_metadata(compiled.metadata)
    compiled.src, compiled.name, compiled.hash, compiled.metadata_group = src, src.name, "", {}
    compiled.kernel = b"\x7fELF"
    compiled.module = compiled.function = compiled._run = None
    return compiled


class _Argument(NamedTuple):
    """A value that Python passes to a kernel. Each element of a tuple is a separate value."""

    path: tuple[int, ...]
    name: str
    value: Any
    constexpr: bool
    specialize: bool

    def constant(self) -> bool:
        """Whether the value is compiled into the kernel instead of passed."""
        one = self.specialize and type(self.value) is int and self.value == 1
        return self.constexpr or self.value is None or one

    def divisible(self) -> bool:
        """Whether the kernel is compiled for a multiple of 16."""
        if self.constant() or not self.specialize or isinstance(self.value, bool | float):
            return False
        return (self.value.data_ptr() if isinstance(self.value, Tensor) else self.value) % 16 == 0

    def passed(self) -> bytes:
        """The bytes of the kernel's parameter."""
        value = self.value
        if isinstance(value, Tensor):
            return struct.pack("<Q", value.data_ptr())
        if isinstance(value, bool):
            return struct.pack("<?", value)
        if isinstance(value, int):
            return struct.pack("<i" if -(2**31) <= value < 2**31 else "<q", value)
        if isinstance(value, float):
            return struct.pack("<f", value)
        raise TypeError(f"{self.name} is a {type(value).__name__}")


def _arguments(kernel: JITFunction, values: dict[str, Any]) -> Iterator[_Argument]:
    def flat(path: tuple[int, ...], name: str, value: Any, constexpr: bool, specialize: bool) -> Iterator[_Argument]:
        if isinstance(value, tuple) and not constexpr:
            for i, element in enumerate(value):
                yield from flat((*path, i), f"{name}[{i}]", element, constexpr, specialize)
        else:
            yield _Argument(path, name, value, constexpr, specialize)

    for i, parameter in enumerate(kernel.params):
        specialize = not parameter.do_not_specialize
        yield from flat((i,), parameter.name, values[parameter.name], parameter.is_constexpr, specialize)


class WrongLaunch(Exception):
    """A launch differs from the one that Python requested."""


def _equal(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise WrongLaunch(f"{what} is {found!r}, not {expected!r}")


class Sweep:
    """Sends launches to the stub and checks each one.

    Args:
        stub: The stub of the driver.
        real: Whether to compile and launch each kernel once. Otherwise, all launches are made, without compiled code.
    """

    def __init__(self, stub: Stub, *, real: bool) -> None:
        self._stub, self._real = stub, real
        self.launches = 0
        self.kernels: set[str] = set()  # launched since the set was last cleared
        self._run = JITFunction.run
        if not real:
            triton.compiler.compile = compile_without_code
        sweep = self

        def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
            return sweep._launch(self, *args, **kwargs)

        JITFunction.run = run

    def _launch(self, kernel: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> Any:
        name = kernel.__name__
        full = f"{kernel.__module__.rpartition('.')[2]}.{name}"
        self.launches += 1
        if self._real and full in self.kernels:
            return None
        self.kernels.add(full)
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        arguments = list(_arguments(kernel, values))
        passed = [each for each in arguments if not each.constant()]
        launch = self._stub.launch
        before = launch.count
        self._stub.num_params.value = len(passed) + 2  # two pointers to scratch memory
        try:
            compiled = self._run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            _equal("number of launches", launch.count - before, 1)
            _equal("grid", tuple(launch.grid), (*grid, 1, 1)[:3])
            _equal("block", tuple(launch.block), (32 * kwargs["num_warps"], 1, 1))
            _equal("shared memory", launch.shared, compiled.metadata.shared)
            _equal("num_stages", compiled.metadata.num_stages, kwargs["num_stages"])
            _equal("stream", launch.stream, STREAM)
            for each, found in zip(passed, launch.params, strict=False):
                expected = each.passed()
                _equal(f"argument {each.name}", struct.pack("<Q", found)[: len(expected)], expected)
            _equal("scratch memory", list(launch.params[len(passed) : len(passed) + 2]), [0, 0])
            self._check_source(compiled.src, arguments)
            if self._real:
                widths = [*(len(each.passed()) for each in passed), 8, 8]
                _equal("bytes of the code's parameters", _widths(compiled.asm["ptx"]), widths)
        except Exception as error:
            error.add_note(f"launching {name}")
            raise
        return compiled

    @staticmethod
    def _check_source(source: Any, arguments: list[_Argument]) -> None:
        """Checks the constants and the multiples of 16 that the compiler knows."""
        for each in arguments:
            _equal(f"{each.name} among constants", each.path in source.constants, each.constant())
            if each.constant():
                _equal(f"constant {each.name}", source.constants[each.path], each.value)
            known = ["tt.divisibility", 16] in source.attrs.get(each.path, [])
            _equal(f"{each.name} known to be a multiple of 16", known, each.divisible())


def _widths(ptx: str) -> list[int]:
    """Size in bytes of each parameter of the kernel in a PTX module."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[bfus](\d+)", entry[1])]


def _cases() -> Iterator[tuple[str, Case, AbstractContextManager[None]]]:
    """The op's name, a case and a tiling, for each case of the benchmarks and of ``tests/ops/table.py``.

    The cases of the table run in each memory layout with all gradients, and with each subset of one or two gradients.
    """

    def inputs(make: Make, *, case: table.Case, layout: str, needs_grad: Sequence[int]) -> list[Any]:
        drawn = case.make(case.shapes[0], dtype=make.dtype, device=make.device, layout=layout)(1)
        return [x if x is None else x.detach().requires_grad_(i in needs_grad) for i, x in enumerate(drawn)]

    for op, benchmark in BENCHMARKS.items():
        yield from ((op, case, nullcontext()) for case in benchmark.cases)
    for name, case in table.CASES.items():
        subsets = [*itertools.combinations(case.needs_grad, 1), *itertools.combinations(case.needs_grad, 2)]
        all_gradients = ((layout, case.needs_grad) for layout in case.layouts)
        for layout, needs_grad in (*all_gradients, *((case.layouts[1], subset) for subset in subsets)):
            found = Case(
                name=f"{name}, {layout}, {needs_grad}",
                inputs=partial(inputs, case=case, layout=layout, needs_grad=needs_grad),
                call=case.function,
                work=lambda size: Work(0, 0),
            )
            yield name.split(",")[0], found, case.tiling()


def main() -> None:
    """Run the sweep and print its result as JSON."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder for the build")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, help="90 for sm_90")
    parser.add_argument("--dtype", nargs="+", default=names)
    parser.add_argument("--op", nargs="+", default=None, help="ops to run (default: all)")
    parser.add_argument("--compile", action="store_true", help="compile, and launch each kernel once per dtype")
    options = parser.parse_args()
    stub = Stub(options.folder)
    sweep = Sweep(stub, real=options.compile)
    kernels: set[str] = set()
    failures: list[str] = []
    for arch in options.arch:
        stub.use(arch)
        for dtype in options.dtype:
            sweep.kernels.clear()
            for op, case, tiling in _cases():
                if options.op is not None and op not in options.op:
                    continue
                before = sweep.launches
                try:
                    with tiling:
                        run_on_meta(case, Make("meta", getattr(torch, dtype)))
                    if sweep.launches == before:
                        raise WrongLaunch("nothing was launched")
                except Exception as error:
                    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
                    failures.append(f"sm_{arch} {op} [{case.name}] {dtype}: {type(error).__name__}: {error}{notes}")
            kernels |= sweep.kernels
    print(json.dumps({"launches": sweep.launches, "kernels": sorted(kernels), "failures": failures}))


if __name__ == "__main__":
    main()

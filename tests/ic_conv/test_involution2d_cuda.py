# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of involution without a GPU: compiled for GPUs by NVRTC, and run on the host as C++.

For the host, a few lines stand in for CUDA's index variables, and a stand-in for CuPy compiles the kernels
with the C++ compiler and launches them on CPU tensors. So the backend's launching code is tested as well.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ic_conv.ops._involution2d_call import checked_call
from ic_conv.ops.backends import cupy_involution2d
from ic_conv.ops.backends.cupy_involution2d import SCALARS, SOURCE, CupyInvolution2d, Plan, options
from tests.ic_conv.test_involution2d import CASES, Case, direct_sum, tensors
from tests.tolerances import assert_near

COMPILER = shutil.which("g++")
SANITIZE = "IC_CONV_SANITIZE_ADDRESS"
PLANS = [Plan(16, 4, 7), Plan(1, 1, 1)]
STREAM = 4242

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

SHIM = """
#define __global__
#define __device__
struct Position { unsigned x; };
static Position blockIdx, blockDim, threadIdx;
#include "SOURCE"
#define LAUNCHER(NAME) \\
    extern "C" void launch_##NAME( \\
        unsigned blocks, unsigned threads, const Scalar *a, const Scalar *b, Scalar *c, SIZES) { \\
        blockDim.x = threads; \\
        for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) \\
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) \\
                NAME(a, b, c, geometry, groups, group_channels, height, width, out_height, out_width, \\
                     stride_y, stride_x, slots); \\
    }
LAUNCHER(forward) LAUNCHER(grad_input) LAUNCHER(grad_weight)
extern "C" void round_trip(const float *values, float *rounded, int n) {
    for (int i = 0; i < n; ++i) rounded[i] = to_float(from_float(values[i]));
}
"""


class HostCupy:
    """What the backend uses of CuPy, on the host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.streams: list[int] = []
        self.sources: list[tuple[str, ...]] = []
        self.cuda = SimpleNamespace(Device=self._device, ExternalStream=self._stream)

    @contextmanager
    def _device(self, index: int | None) -> Iterator[None]:
        yield

    @contextmanager
    def _stream(self, pointer: int, index: int | None) -> Iterator[None]:
        self.streams.append(pointer)
        yield
        self.streams.pop()

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:
        library = self.folder / f"{'_'.join(options).replace('-D', '')}.so"
        if not library.exists():
            (self.folder / SOURCE.name).write_text(code)
            shim = self.folder / "shim.cpp"
            shim.write_text(SHIM.replace("SOURCE", SOURCE.name))
            flags = ["-fsanitize=address", "-g"] if SANITIZE in os.environ else []
            command = [
                str(COMPILER),
                "-shared",
                "-fPIC",
                "-w",
                "-msse2",
                *flags,
                *options,
                str(shim),
                "-o",
                str(library),
            ]
            subprocess.run(command, check=True)
            self.sources.append(options)
        loaded = ctypes.CDLL(str(library))
        return SimpleNamespace(library=loaded, get_function=lambda name: self._kernel(loaded, name))

    def _kernel(self, library: ctypes.CDLL, name: str) -> Callable[..., None]:
        def launch(grid: tuple[int], block: tuple[int], args: tuple[int, ...]) -> None:
            assert self.streams == [STREAM]
            pointers, sizes = args[:4], args[4:]
            launcher = getattr(library, f"launch_{name}")
            launcher(*grid, *block, *map(ctypes.c_void_p, pointers), *map(ctypes.c_longlong, sizes))

        return launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture
def cupy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostCupy]:
    """A CuPy whose kernels run on the host."""
    host = HostCupy(folder)
    monkeypatch.setitem(sys.modules, "cupy", host)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    cupy_involution2d._module.cache_clear()
    yield host
    cupy_involution2d._module.cache_clear()


def run(backend: CupyInvolution2d, case: Case, dtype: torch.dtype) -> None:
    """Compares the three kernels with the direct sums."""
    inputs = tensors(case)
    x, weight, grad = (t.to(dtype) for t in inputs)
    geometry = checked_call(
        x, weight, **{"stride": 1, "padding": None, "dilation": 1, **case.options}
    ).geometry
    results = (
        backend.forward(x, weight, geometry),
        backend.grad_input(grad, weight, geometry),
        backend.grad_weight(grad, x, geometry),
    )
    for actual, reference in zip(results, direct_sum(*inputs, **case.options), strict=True):
        assert actual.dtype == dtype
        assert_near(actual, reference)


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_host_all_geometries(case: Case, cupy: HostCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as much work for each thread as the kernels allow."""
    monkeypatch.setattr(cupy_involution2d, "ENOUGH_THREADS", 1)
    run(CupyInvolution2d(), case, torch.float32)


@needs_compiler
@pytest.mark.parametrize("dtype", SCALARS)
@pytest.mark.parametrize("plain", [False, True])
def test_host_dtypes_and_small_plans(plain: bool, dtype: torch.dtype, cupy: HostCupy) -> None:
    case = Case(2, 32, 2, (5, 7), (3, 3), {"stride": (2, 1), "dilation": [(1, 1), (2, 3)]})
    run(CupyInvolution2d(plain), case, dtype)


@needs_compiler
def test_host_wide_indices(cupy: HostCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_involution2d, "INT_LIMIT", 10)
    run(CupyInvolution2d(), Case(1, 8, 2, (4, 5), (3, 3)), torch.float32)
    assert all("-DWIDE=1" in options for options in cupy.sources)


@needs_compiler
def test_host_strides_and_special_values(cupy: HostCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any memory layout goes in, channels last comes out; NaN and infinity reach only what reads them."""
    monkeypatch.setattr(cupy_involution2d, "ENOUGH_THREADS", 1)
    x, weight, _ = tensors(Case(1, 8, 2, (4, 5), (3, 3)))
    geometry = checked_call(x, weight, 1, None, 1).geometry
    x[0, 0, 3, 4], x[0, 1, 3, 4], weight[0, 0, 0, 0, 0, 0] = torch.nan, torch.inf, torch.nan
    for dtype in SCALARS:
        last = x.to(dtype, memory_format=torch.channels_last)
        weights = weight.to(dtype).transpose(4, 5).contiguous().transpose(4, 5)
        y = CupyInvolution2d().forward(last, weights, geometry)
        assert y.is_contiguous(memory_format=torch.channels_last)
        finite = y.isfinite().double().mean((0, 2, 3))
        assert finite.tolist() == [0.8, 0.8, 1, 1, 1, 1, 1, 1]
        assert y[0, 0, 3, 4].isnan()


@needs_compiler
@pytest.mark.parametrize("dtype", SCALARS)
def test_host_rounding(dtype: torch.dtype, cupy: HostCupy) -> None:
    """As PyTorch rounds: ties to even, overflow to infinity, any NaN to NaN."""
    bits = torch.randint(
        0, 2**31 - 1, (10_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    corners = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1])
    values = torch.cat([bits, -bits, corners.int()]).view(torch.float32)
    rounded = torch.empty_like(values)
    module = cupy_involution2d._module(dtype, (3, 3), Plan(1, 1, 1), False)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, rounded))
    module.library.round_trip(*pointers, len(values))
    torch.testing.assert_close(rounded, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_one_compilation_for_all_sizes(cupy: HostCupy) -> None:
    for size in ((4, 5), (6, 3), (9, 9)):
        run(CupyInvolution2d(), Case(1, 4, 1, size, (3, 3)), torch.float32)
    assert len(cupy.sources) <= len({"gather", "grad_weight"})


@needs_compiler
def test_empty_batch_launches_nothing(cupy: HostCupy) -> None:
    x, weight = torch.zeros(0, 4, 5, 5), torch.zeros(0, 1, 3, 3, 5, 5)
    geometry = checked_call(x, weight, 1, None, 1).geometry
    assert CupyInvolution2d().forward(x, weight, geometry).shape == (0, 4, 5, 5)
    assert CupyInvolution2d().grad_weight(x, x, geometry).shape == weight.shape
    assert not cupy.sources


@needs_compiler
@pytest.mark.slow
def test_no_kernel_leaves_its_tensors() -> None:
    """The host tests again under the address sanitizer, which knows where each tensor ends."""
    assert COMPILER is not None
    found = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True)
    library = found.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ comes without libasan")
    environment = {**os.environ, SANITIZE: "1", "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "host", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize("arch", ["sm_70", "sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", SCALARS)
def test_compiles_for_gpus(dtype: torch.dtype, arch: str) -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    if (oldest := min(nvrtc.getSupportedArchs())) > int(arch.removeprefix("sm_")):
        version = ".".join(map(str, nvrtc.getVersion()))
        pytest.skip(f"NVRTC {version} starts at sm_{oldest}; {arch} needs that of CUDA 12, from cupy-cuda12x")
    for plan in PLANS:
        program = nvrtc.createProgram(SOURCE.read_text(), SOURCE.name, [], [])
        macros = options(dtype, (7, 7), plan, wide=plan.rows == 1)
        nvrtc.compileProgram(program, [f"--gpu-architecture={arch}", *macros])
        log = nvrtc.getProgramLog(program).strip("\0\n ").splitlines()
        assert not [line for line in log if "Architectures prior to" not in line]  # sm_70 is deprecated
        assert len(nvrtc.getCUBIN(program)) > 10_000

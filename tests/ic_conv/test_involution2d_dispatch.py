# SPDX-License-Identifier: Apache-2.0
"""Which backend of involution runs, what compilers and exporters see of it, and what it costs in memory."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ic_conv.benchmark.measure import peak_memory
from ic_conv.functional import involution2d
from ic_conv.ops._involution2d_call import checked_call
from ic_conv.ops.backends import cupy_involution2d, numba_involution2d
from ic_conv.ops.dispatch import BackendUnavailableError
from ic_conv.ops.involution2d import INVOLUTION2D, KERNELS
from tests.tolerances import assert_near

numba_only = pytest.mark.skipif(
    numba_involution2d.why_not(None) is not None, reason=f"numba: {numba_involution2d.why_not(None)}"
)
RUNNABLE = [name for name, reason in INVOLUTION2D.available().items() if reason is None]


def call(device: str, dtype: torch.dtype = torch.float32, channels: int = 16) -> Any:
    """A call that looks as if its tensors lay on a device; backends look at no more before they run."""
    x = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, channels, 5, 5))
    return SimpleNamespace(x=x, geometry=SimpleNamespace(groups=1))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that packages are installed or missing."""

    def pretend(cupy: str | None, numba: str | None) -> None:
        monkeypatch.setattr(cupy_involution2d, "_cupy_missing", lambda: cupy)
        monkeypatch.setattr(numba_involution2d, "_numba_missing", lambda: numba)

    return pretend


@pytest.mark.parametrize(
    ("arguments", "cupy", "numba", "chosen"),
    [
        ({"device": "cuda:1"}, None, None, "cupy"),
        ({"device": "cuda", "dtype": torch.bfloat16}, None, None, "cupy"),
        ({"device": "cuda", "dtype": torch.float64}, None, None, "shift"),
        ({"device": "cuda"}, "no CuPy", None, "shift"),
        ({"device": "cpu"}, None, None, "numba"),
        ({"device": "cpu", "channels": 20}, None, None, "numba"),
        ({"device": "cpu", "channels": 6}, None, None, "shift"),
        ({"device": "cpu", "dtype": torch.bfloat16}, None, None, "shift"),
        ({"device": "cpu"}, None, "no Numba", "shift"),
        ({"device": "meta"}, None, None, "shift"),
    ],
)
def test_choice(
    probes: Callable[..., None],
    arguments: dict[str, Any],
    cupy: str | None,
    numba: str | None,
    chosen: str,
) -> None:
    probes(cupy, numba)
    assert INVOLUTION2D.choose(call(**arguments)).name == chosen


@pytest.mark.parametrize(
    ("wanted", "arguments", "reason"),
    [
        ("cupy", {"device": "cpu"}, "needs CUDA tensors, got cpu"),
        ("cupy_plain", {"device": "cuda", "dtype": torch.float64}, "got torch.float64"),
        ("cupy", {"device": "cuda"}, "no CuPy"),
        ("numba", {"device": "cuda"}, "needs CPU tensors, got cuda"),
        ("numba", {"device": "cpu", "dtype": torch.float16}, "needs float32, got torch.float16"),
        ("numba", {"device": "cpu", "channels": 6}, "multiples of 4, got 6"),
    ],
)
def test_refusal(probes: Callable[..., None], wanted: str, arguments: dict[str, Any], reason: str) -> None:
    probes("no CuPy" if reason == "no CuPy" else None, None)
    with pytest.raises(BackendUnavailableError, match=reason):
        INVOLUTION2D.choose(call(**arguments), wanted)


def test_plain_kernel_is_only_run_on_request(probes: Callable[..., None]) -> None:
    probes(None, None)
    names = INVOLUTION2D.names
    assert names.index("cupy_plain") > names.index("shift")
    assert INVOLUTION2D.choose(call("cuda"), "cupy_plain").name == "cupy_plain"


def test_missing_cupy_is_said_once_and_only_for_cuda(
    probes: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    probes("no CuPy, says a test", None)
    cupy_involution2d._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        INVOLUTION2D.available()
        INVOLUTION2D.choose(call("cpu"))
        assert not caplog.records
        for _ in range(3):
            INVOLUTION2D.choose(call("cuda"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no CuPy, says a test" in caplog.text


def test_importing_loads_no_optional_package() -> None:
    packages = {"cupy", "numba", "llvmlite", "triton", "onnx", "mmengine", "timm", "matplotlib"}
    code = f"import sys, ic_conv.functional; print(sorted({packages} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def inputs(size: int = 7, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 16, size, size, **options), torch.randn(2, 4, 3, 3, 4, 4, **options)


@pytest.mark.parametrize("backend", [name for name in KERNELS if name in RUNNABLE])
@pytest.mark.parametrize("derivative", ["", "_grad_input", "_grad_weight"])
def test_registration(backend: str, derivative: str) -> None:
    """PyTorch's own checks of schema, fake kernels and autograd, for the operator and its derivatives."""
    x, weight = inputs(requires_grad=True)
    grad = torch.randn(2, 16, 4, 4, requires_grad=True)
    operator = getattr(torch.ops.ic_conv, f"involution2d{derivative}").default
    options = ([2, 2], [1, 1] * 4, [1, 1] * 4, backend)
    arguments: dict[str, tuple[Any, ...]] = {
        "": (x, weight, *options),
        "_grad_input": (grad, weight, [7, 7], *options),
        "_grad_weight": (grad, x, [3, 3], *options),
    }
    torch.library.opcheck(operator, arguments[derivative])


def test_meta_tensors_have_the_right_size() -> None:
    x, weight = (t.to("meta") for t in inputs())
    assert involution2d(x, weight, 2).shape == (2, 16, 4, 4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", [None, *RUNNABLE])
def test_compile(backend: str | None, channels_last: bool) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return involution2d(x.sin(), weight, 2, dilation=[(1, 1), (1, 2), (1, 2), (2, 1)], backend=backend)

    x, weight = inputs()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        y = run(x, weight)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))))
    for actual, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, eager)


def test_compiler_takes_the_kernel_or_sees_the_loop(probes: Callable[..., None]) -> None:
    """Its graph has our operator where a fused kernel runs, and plain operations where none does."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph

    for numba in (None, "no Numba"):
        probes(None, numba)
        torch.compiler.reset()
        torch.compile(involution2d, fullgraph=True, backend=keep)(*inputs(), 2)
    ours = ["ic_conv.involution2d" in str([node.target for node in graph.graph.nodes]) for graph in graphs]
    assert ours == [True, False]


class Module(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return involution2d(x, weight, 2, dilation=[(1, 1), (1, 2), (1, 2), (2, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_graph_has_only_pytorch_operations(dtype: torch.dtype) -> None:
    x, weight = inputs(dtype=dtype)
    program = torch.export.export(Module(), (x, weight))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in targets)
    reference = Module()(x.double(), weight.double())
    assert_near(program.module()(x, weight), reference)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, weight = inputs()
    path = tmp_path / "involution.onnx"
    torch.onnx.export(Module(), (x, weight), path, dynamo=dynamo, input_names=["x", "weight"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy(), "weight": weight.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), Module()(x, weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
def test_peak_memory_of_forward(backend: str, dtype: torch.dtype) -> None:
    """At most 1.2 times input, output and weights, where unfolding takes 49 times the input."""
    device = torch.device("cuda" if backend.startswith("cupy") else "cpu")
    x = torch.randn(8, 64, 56, 56, dtype=dtype, device=device)
    weight = torch.randn(8, 4, 7, 7, 56, 56, dtype=dtype, device=device)
    if KERNELS[backend].why_not(checked_call(x, weight, 1, None, 1)) is not None:
        pytest.skip(f"{backend} does not take {dtype}")
    with torch.no_grad():
        involution2d(x[:1], weight[:1], backend=backend)
        peaks = [peak_memory(lambda: involution2d(x, weight, backend=backend), device) for _ in range(3)]
        unfolded = peak_memory(lambda: involution2d(x, weight, backend="reference"), device)
    if unfolded is None:
        pytest.skip("this system does not tell a process its peak memory")
    peak = min(peak for peak in peaks if peak is not None)  # the allocator's own growth comes on top
    assert x.nbytes / 2 <= peak <= 1.2 * (2 * x.nbytes + weight.nbytes) < unfolded


@numba_only
def test_numba_from_many_threads() -> None:
    """Calls from several threads at a time share the helpers and do not mix their results."""
    cases = [(torch.randn(2, 16, 9, 9), torch.randn(2, 2, 3, 3, 9, 9)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: involution2d(case[0], case[1], backend="numba"), cases * 4))
    for result, (x, weight) in zip(results, cases * 4, strict=True):
        assert_near(result, involution2d(x.double(), weight.double()))


@numba_only
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_numba_shares_lines_among_threads(threads: int) -> None:
    """Any number of threads, more than there are groups too, covers every line once."""
    x, weight = torch.randn(1, 16, 13, 5), torch.randn(1, 2, 5, 5, 7, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = involution2d(x, weight, 2, backend="numba")
    finally:
        torch.set_num_threads(before)
    assert_near(y, involution2d(x.double(), weight.double(), 2))


@numba_only
def test_numba_after_a_fork() -> None:
    """A worker process that was forked after a call gets threads of its own."""
    code = """
import os, torch
from ic_conv.functional import involution2d
torch.set_num_threads(3)
x, weight = torch.randn(2, 16, 9, 9), torch.randn(2, 2, 3, 3, 9, 9)
y = involution2d(x, weight, backend="numba")
if (child := os.fork()) == 0:
    torch.set_num_threads(3)  # a fork leaves one
    os._exit(0 if torch.equal(involution2d(x, weight, backend="numba"), y) else 1)
print(os.waitpid(child, 0)[1])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "0", result.stderr

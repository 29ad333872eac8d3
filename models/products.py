"""Products of matrices in fp32 on a CPU, by the library that is fastest there.

Which one that is, is a fact of the CPU and of the installation, not a measurement at the start, so that all
runs on a machine compute the same. The measurements: docs/performance.md, "the model's step, experiments" and
"products on a CPU without AVX-512".
"""

import os
import platform
from enum import Enum, auto
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.nn import functional as F


class Library(Enum):
    """A library of matrix products."""

    PYTORCH = auto()
    """What PyTorch calls: MKL on x86-64."""
    ONEDNN = auto()
    OPENBLAS = auto()
    """NumPy's."""


# Multiply-accumulates. With less work oneDNN takes longer to prepare than it saves, and OpenBLAS is no faster
# than MKL.
_ENOUGH_WORK = {Library.PYTORCH: 0, Library.ONEDNN: 2**22, Library.OPENBLAS: 2**28}


def fastest_library(cpuinfo: Path = Path("/proc/cpuinfo")) -> Library:
    """The library of large products in fp32 on this machine.

    MKL has no AVX-512 code for CPUs by AMD, where oneDNN has twice its rate. On those with AVX2 only, NumPy's
    OpenBLAS is faster than both.
    """
    level = torch.backends.cpu.get_cpu_capability()
    if platform.machine() != "x86_64" or level not in ("AVX2", "AVX512") or not _is_amd(cpuinfo):
        return Library.PYTORCH
    if level == "AVX2":
        return Library.OPENBLAS if numpy_has_openblas() else Library.PYTORCH
    return Library.ONEDNN if pytorch_has_onednn() else Library.PYTORCH


def pytorch_has_onednn() -> bool:
    """Whether PyTorch is built with oneDNN and offers its product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def numpy_has_openblas() -> bool:
    """Whether NumPy's products are OpenBLAS's, with threads whose number can be set for all of a process.

    OpenMP's can be set for a thread only.
    """
    parts = np.show_config(mode="dicts").get("Build Dependencies", {})
    found = _controller().lib_controllers
    is_settable = bool(found) and all(blas.threading_layer == "pthreads" for blas in found)
    return "openblas" in parts.get("blas", {}).get("name", "") and is_settable


def _controller() -> ThreadpoolController:
    """Of OpenBLAS's own threads."""
    return ThreadpoolController().select(internal_api="openblas")


def _is_amd(cpuinfo: Path) -> bool:
    try:
        vendor = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return False
    return vendor.endswith("AuthenticAMD")


def most_openblas_threads() -> int:
    """With more threads of PyTorch its products are not OpenBLAS's.

    Where OpenBLAS's threads do not sleep between products (see `models/__init__.py`), they take CPU time from
    PyTorch's. More than two were not measured.
    """
    return 2 if os.environ.get("OPENBLAS_THREAD_TIMEOUT") == "4" else 1


_FASTEST = fastest_library()
_MOST_THREADS = most_openblas_threads()


def library_of(operand: Tensor, outputs: int) -> Library:
    """The library of `product(operand, b)`. outputs: rows of b."""
    is_fp32 = operand.device.type == "cpu" and operand.dtype == torch.float32
    if not is_fp32 or operand.numel() * outputs < _ENOUGH_WORK[_FASTEST]:
        return Library.PYTORCH
    if _FASTEST is Library.OPENBLAS and torch.get_num_threads() > _MOST_THREADS:
        return Library.PYTORCH
    return _FASTEST


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale * a @ b.T + bias`: R K, N K, N -> R N. Has no gradient where the library is not PyTorch's."""
    library = library_of(a, len(b))
    if library is Library.PYTORCH:
        return F.linear(a, b if scale == 1.0 else b * scale, bias)
    compute = _onednn if library is Library.ONEDNN else _openblas().product
    if scale == 1.0:
        return compute(a, b, bias)
    # The factor goes to the smallest of the three tensors.
    if len(a) * len(b) <= min(a.numel(), b.numel()):
        return compute(a, b, None if bias is None else bias / scale).mul_(scale)
    return compute(*((a * scale, b) if a.numel() <= b.numel() else (a, b * scale)), bias)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # R K, N K, N -> R N
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


class _OpenBLAS:
    """NumPy's OpenBLAS in as many threads as PyTorch has."""

    def __init__(self) -> None:
        self._controller = _controller()

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # R K, N K, N -> R N
        result = a.new_empty(len(a), len(b))
        operands = a.detach().numpy(), b.detach().t().numpy()
        # Infinite results are no warning, as in PyTorch.
        with _LOCK, self._controller.limit(limits=torch.get_num_threads()), np.errstate(all="ignore"):
            np.dot(*operands, out=result.numpy())
        return result if bias is None else result.add_(bias)


@cache
def _openblas() -> _OpenBLAS:
    return _OpenBLAS()


_LOCK = Lock()  # of OpenBLAS's number of threads
if hasattr(os, "register_at_fork"):  # not on Windows
    # Not during a product: OpenBLAS ends its threads before a fork.
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)

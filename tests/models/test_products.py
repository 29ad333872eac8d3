"""Which library computes a product of matrices, and with how many threads."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import products
from models.linear import Linear
from models.products import Library, fastest_library, numpy_has_openblas, product

NEEDS_OPENBLAS = pytest.mark.skipif(not numpy_has_openblas(), reason="NumPy has no OpenBLAS")

AMD, INTEL = "processor : 0\nvendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.fixture
def fastest(tmp_path, monkeypatch):
    """The library on an x86-64 of this instruction set, with this text in /proc/cpuinfo."""
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")

    def find(level, text):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        return fastest_library(path)

    return find


def test_the_library_is_chosen_by_vendor_and_instruction_set(fastest, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "numpy_has_openblas", lambda: True)
    assert fastest("AVX512", AMD) is Library.ONEDNN
    assert fastest("AVX2", AMD) is Library.OPENBLAS
    others = [("DEFAULT", AMD), ("AVX512", INTEL), ("AVX2", INTEL), ("AVX2", "nothing")]
    assert {fastest(level, text) for level, text in others} == {Library.PYTORCH}
    assert fastest_library(tmp_path / "absent") is Library.PYTORCH
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fastest("AVX512", AMD) is Library.PYTORCH
    monkeypatch.setattr(products, "numpy_has_openblas", lambda: False)
    assert fastest("AVX2", AMD) is Library.PYTORCH
    monkeypatch.setattr(products.platform, "machine", lambda: "aarch64")
    assert fastest("AVX512", AMD) is Library.PYTORCH


@pytest.mark.parametrize(
    ("build", "layers", "expected"),
    [
        ({"blas": {"name": "scipy-openblas"}}, ["pthreads"], True),
        ({"blas": {"name": "openblas"}}, ["pthreads", "openmp"], False),  # as of conda
        ({"blas": {"name": "mkl-sdl"}}, ["pthreads"], False),  # SciPy's
        ({"blas": {"name": "openblas"}}, [], False),  # not found, so their number cannot be set
        ({}, ["pthreads"], False),  # built without BLAS
    ],
)
def test_numpys_openblas_is_used_if_its_threads_can_be_set(monkeypatch, build, layers, expected):
    monkeypatch.setattr(np, "show_config", lambda mode: {"Build Dependencies": build})
    found = [SimpleNamespace(threading_layer=layer) for layer in layers]
    monkeypatch.setattr(products, "_controller", lambda: SimpleNamespace(lib_controllers=found))
    assert numpy_has_openblas() == expected


@pytest.mark.parametrize("chosen", [Library.ONEDNN, Library.OPENBLAS])
def test_a_library_computes_large_products_in_fp32_and_no_others(monkeypatch, chosen):
    calls = []

    def plain(a, b, bias):
        calls.append(a.shape)
        return F.linear(a, b, bias)

    used = {Library.ONEDNN: (products, "_onednn"), Library.OPENBLAS: (products._openblas(), "product")}
    monkeypatch.setattr(*used[chosen], plain)
    monkeypatch.setitem(products._ENOUGH_WORK, chosen, 64 * 8 * 16)
    layer, many, few = Linear(8, 16), torch.randn(64, 8), torch.randn(63, 8)
    for library, expected in ((chosen, [many.shape]), (Library.PYTORCH, [])):
        monkeypatch.setattr(products, "_FASTEST", library)
        calls.clear()
        for x in (many, few):
            layer(x)
        layer.double()(many.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(many).dtype == torch.bfloat16
        assert calls == expected


@pytest.fixture
def threads():
    """Sets the number of PyTorch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@NEEDS_OPENBLAS
def test_openblas_has_pytorchs_number_of_threads(monkeypatch, threads):
    limits = []
    dot, blas = np.dot, products._openblas()._controller.lib_controllers

    def note(*operands, out):
        limits.extend(library.num_threads for library in blas)
        dot(*operands, out=out)

    monkeypatch.setattr(np, "dot", note)
    monkeypatch.setattr(products, "_MOST_THREADS", 2)
    monkeypatch.setattr(products, "_FASTEST", Library.OPENBLAS)
    monkeypatch.setitem(products._ENOUGH_WORK, Library.OPENBLAS, 0)
    a, before = torch.randn(7, 8), [library.num_threads for library in blas]
    for count in (1, 2):
        threads(count)
        limits.clear()
        torch.testing.assert_close(product(a, a), a @ a.t())
        assert set(limits) == {count}
        assert [library.num_threads for library in blas] == before
    threads(3)
    limits.clear()
    product(a, a)
    assert not limits, "more threads than were measured"


@pytest.mark.parametrize(
    ("loaded", "given", "expected", "threads"),
    [
        ("models", None, "4", 2),
        ("launch.train", None, "4", 2),
        ("launch.evaluate", None, "4", 2),
        ("launch.bench", None, "4", 2),
        ("numpy", None, "", 1),
        ("models", "26", "26", 1),
    ],
)
def test_openblas_has_two_threads_only_if_they_sleep_between_products(
    monkeypatch, loaded, given, expected, threads
):
    """Whether they do is settled when NumPy is loaded."""
    variable = "OPENBLAS_THREAD_TIMEOUT"
    monkeypatch.delenv(variable, raising=False)
    if given is not None:
        monkeypatch.setenv(variable, given)
    code = f"import {loaded}, models, os; print(os.getenv({variable!r}, ''))"
    shown = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert shown.stdout.strip() == expected
    monkeypatch.setenv(variable, expected)
    assert products.most_openblas_threads() == threads


@NEEDS_OPENBLAS
def test_a_forked_child_computes_products(monkeypatch, threads):
    monkeypatch.setattr(products, "_FASTEST", Library.OPENBLAS)
    monkeypatch.setitem(products._ENOUGH_WORK, Library.OPENBLAS, 0)
    monkeypatch.setattr(products, "_MOST_THREADS", 2)
    threads(2)
    a = torch.randn(4, 8)
    expected = product(a, a)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            code = 0 if torch.equal(product(a, a), expected) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_infinite_results_come_without_a_warning(library, recwarn):
    a = torch.tensor([[3e38, 3e38, -3e38], [1.0, float("nan"), float("inf")]])
    result = product(a, a)
    assert result[0, 0] == float("inf") and result[1].isnan().all()
    assert not recwarn


def test_operands_of_any_strides(library):
    wide = torch.randn(6, 40)
    views = (wide[:, 3:11], wide.t()[:8, :].t(), wide[:, 0:16:2], wide[:1, :8].expand(6, 8), wide[::2, :8])
    for a in views:
        for b in views:
            expected = (a.double() @ b.double().t()).float()
            torch.testing.assert_close(product(a, b), expected, atol=1e-5, rtol=1e-5)

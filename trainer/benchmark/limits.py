"""What the machine can do at most: matrix products, copies in memory, the disk."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from models.linear import linear
from trainer.benchmark.timing import OtherPrograms, measure_costs

SECONDS = 1.0
"""Of each measurement."""
_CHUNK = 2**24


def measure_products(
    device: str, threads: int, rows: int, inner: int, columns: int, precision: str
) -> dict[str, Any]:
    """The rate of a matrix product (rows, inner) x (inner, columns), as the model computes it, and of a copy
    in memory.

    Returns FLOP per second and per CPU second, and bytes read plus bytes written per second.
    """
    torch.set_num_threads(threads)
    place = torch.device(device)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(rows, inner, device=place, dtype=kind)
    b = torch.randn(columns, inner, device=place, dtype=kind)
    others = OtherPrograms()
    products = measure_costs(lambda: linear(a, b), place, SECONDS)
    flops = 2 * rows * inner * columns
    source = torch.ones(2**28 if place.type == "cuda" else 2**25, device=place)
    target = torch.empty_like(source)
    copies = measure_costs(lambda: target.copy_(source), place, SECONDS)
    moved = 2 * source.numel() * source.element_size()
    return {
        "flops_per_second": flops / _least([cost.seconds for cost in products]),
        "flops_per_cpu_second": flops / _least([cost.cpu for cost in products]),
        "bytes_per_second": moved / _least([cost.seconds for cost in copies]),
        "others": others.cores(),
    }


def _least(values: list[float]) -> float:
    """The median of the fastest third: a limit is what is reached without disturbance."""
    fastest = sorted(values)[: max(1, len(values) // 3)]
    return fastest[len(fastest) // 2]


def measure_disk(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second written to a new file and flushed, and read from the disk again."""
    path = folder / "disk-rate.tmp"
    block = os.urandom(_CHUNK)
    try:
        begun = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(max(1, size // _CHUNK)):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter() - begun
        size = path.stat().st_size
        drop_from_cache(path)
        begun = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass
        return size / written, size / (time.perf_counter() - begun)
    finally:
        path.unlink(missing_ok=True)


def drop_from_cache(path: Path) -> None:
    """Have the kernel forget a file's pages, so that they are read from the disk again."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

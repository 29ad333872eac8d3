"""Inspects the GPU and its libraries, and measures its peak rates."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from pipelines import SELFTEST_MODULE
from pipelines.decode.nvdec import LIBRARY, has_nvdec
from pipelines.worker_pool import usable_cores
from trainer.distributed.environment import describe_environment
from trainer.engine.memory_estimate import GIB
from trainer.monitoring.throughput import peak_flops
from trainer.verification.steps import ROOT, VerificationTask

LEAST_OF_PEAK = 0.6
"""Share of the GPU's bf16 peak that a large product must reach; an H100 reached 0.79."""
LEAST_COPIED = 0.5e12
"""Bytes per second read and written that a copy must reach; an H100 reached 2.98e12."""
PREFLIGHT_SECONDS = 60


def inspect_gpu(task: VerificationTask) -> None:
    """Reports the machine, measures memory bandwidth and product rates, and runs the decoder's self-test and
    the preflight."""
    report, device = task.report, task.device
    about = describe_environment()
    report.measure("packages", ", ".join(f"{name} {version}" for name, version in about["packages"].items()))
    report.measure("Python, CUDA of torch", f"{about['python']}, {about['cuda']}")
    report.measure("CPU", f"{about['cpu']}, {usable_cores()} cores usable")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    shared = shutil.disk_usage("/dev/shm").total / GIB
    report.measure("host memory, /dev/shm", f"{memory:.0f} GiB, {shared:.1f} GiB")
    if task.gpu:
        properties = torch.cuda.get_device_properties(device)
        name = torch.cuda.get_device_name(device)
        report.measure("GPU", f"{name}, {properties.total_memory / GIB:.1f} GiB, {driver()}")
        peak = peak_flops(name)
        report.check(
            "its bf16 peak is known", peak is not None, f"{peak and peak / 1e12} TFLOP/s", "a number"
        )
        report.check("NVDEC's library", has_nvdec(), LIBRARY, "can be loaded")
        for codec, limits in nvdec_limits().items():
            report.measure(f"NVDEC {codec}", limits)
    measure_ceilings(task)
    command = [sys.executable, "-m", SELFTEST_MODULE, str(device)]
    trial = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    output = (trial.stdout.strip() or trial.stderr.strip())[-200:]
    right = trial.returncode == 0 and json.loads(trial.stdout) == {"frames": 16}
    report.check("trial decode by DALI", right, output, '{"frames": 16}')
    command = [sys.executable, "launch/doctor.py", "--folder", str(task.folder)]
    doctor = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PREFLIGHT_SECONDS, check=False
    )
    print(doctor.stdout, doctor.stderr)
    output = "" if doctor.returncode == 0 else " ".join((doctor.stdout + doctor.stderr).split())[-300:]
    report.check("preflight", doctor.returncode == 0, f"exit code {doctor.returncode} {output}", "0")


def measure_ceilings(task: VerificationTask) -> None:
    """Measures a copy on the device and matrix products. A shared GPU, or one that is throttled, fails."""
    report, device = task.report, task.device
    rate = bandwidth(device)
    name, text = "copy on the device, bytes read and written", f"{rate / 1e9:.0f} GB/s"
    if task.gpu:
        report.check(name, rate >= LEAST_COPIED, text, f"at least {LEAST_COPIED / 1e9:.0f} GB/s")
    else:
        report.measure(name, text)
    side = 8192 if task.gpu else 1024
    flops = product_rate(device, side, torch.float32)
    report.measure(f"float32 product of {side} squared", f"{flops / 1e12:.2f} TFLOP/s")
    if not task.gpu:
        return
    flops = product_rate(device, side, torch.bfloat16)
    name, text = f"bfloat16 product of {side} squared", f"{flops / 1e12:.2f} TFLOP/s"
    peak = peak_flops(torch.cuda.get_device_name(device))
    if peak is None:
        report.measure(name, text)
    else:
        report.check(name, flops >= LEAST_OF_PEAK * peak, text, f"{LEAST_OF_PEAK:.0%} of the peak")


def driver() -> str:
    """The driver's version, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"driver unknown ({error})"
    return f"driver {output.split()[0]}"


def bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second, of a large copy on the device."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def product_rate(device: torch.device, side: int, kind: torch.dtype) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: torch.mm(a, b), device)


def seconds_of(work: Callable[[], object], device: torch.device, runs: int = 10) -> float:
    """Median seconds of `work` after three warm-up runs; on a GPU between events."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(runs):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


class _DecodeCaps(ctypes.Structure):
    """CUVIDDECODECAPS of NVIDIA's cuviddec.h."""

    _fields_ = [
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("decoders", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte * 4),
        ("reserved3", ctypes.c_uint * 10),
    ]


_CODECS = {"MPEG-2": 1, "MPEG-4": 2, "H.264": 4, "JPEG": 5, "HEVC": 8, "VP8": 9, "VP9": 10, "AV1": 11}
"""cudaVideoCodec of cuviddec.h."""
_CHROMA = {"4:2:0": 1, "4:2:2": 2, "4:4:4": 3}
"""cudaVideoChromaFormat of cuviddec.h."""


def nvdec_limits() -> dict[str, str]:
    """The result of `cuvidGetDecoderCaps` for each codec in the current CUDA context, as text."""
    torch.zeros(1, device="cuda")  # makes the context
    library = ctypes.CDLL(LIBRARY)
    found = {}
    for name, codec in _CODECS.items():
        for chroma, number in _CHROMA.items():
            for bits in (8, 10):
                caps = _DecodeCaps(codec=codec, chroma=number, bit_depth_minus_8=bits - 8)
                code = library.cuvidGetDecoderCaps(ctypes.byref(caps))
                if code != 0:
                    found[name] = f"cuvidGetDecoderCaps gave {code}"
                elif caps.supported:
                    sides = f"{caps.min_width}x{caps.min_height} to {caps.max_width}x{caps.max_height}"
                    found[f"{name} {chroma} {bits} bits"] = f"{sides}, {caps.decoders} decoders"
    return found

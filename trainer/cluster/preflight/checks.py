"""The checks of one node: GPUs, NVDEC, memory, disks, manifests and versions."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

import torch

from models import ModelError
from pipelines import SELFTEST_MODULE
from pipelines.autotune import AHEAD
from pipelines.dataset.manifest import Manifest
from pipelines.errors import DataError
from trainer.checkpoint.retention import MARGIN
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment, describe_environment
from trainer.engine.memory_estimate import GIB, RESERVE, free_bytes
from trainer.errors import UserError
from trainer.setup.checkpoint_space import checkpoint_bytes, checkpoints_to_come
from trainer.system.device import check_fp8
from trainer.system.formatting import format_bytes
from trainer.system.gpu import multiplies_exactly, query_smi
from trainer.system.timeouts import run_with_timeout

TIMEOUT = 60.0  # seconds for a check, which takes a second or so on a healthy node
NVDEC_TIMEOUT = 120.0  # seconds: another process imports DALI
LEAST_MEMORY = GIB  # bytes per rank for the libraries and a batch
LEAST_SHARED = 2**27  # bytes per rank: with a container's 64 MiB, DALI's workers stop at the first batch
TEMPORARY = GIB  # bytes that compilers and MLflow write, with a wide margin
FRAMES = 16  # of the clip for NVDEC


class Status(IntEnum):
    """Ordered: the worst of several is their maximum."""

    SKIPPED = 0
    OK = 1
    WARNING = 2
    FAILED = 3


@dataclass(frozen=True)
class CheckResult:
    """The result of a check on one node. advice: what to do about a warning or a failure."""

    check: str
    status: Status
    text: str
    advice: str = ""


Facts = dict[str, dict[str, str]]
"""By check and name, values that must be equal on all nodes."""


def run_check(
    check: str, work: Callable[[], Iterable[CheckResult]], seconds: float = TIMEOUT
) -> list[CheckResult]:
    """The results of a check; an error or a timeout is a failed result."""
    try:
        return run_with_timeout(seconds, lambda: list(work()), check)
    except TimeoutError as error:
        return [CheckResult(check, Status.FAILED, str(error), "see the node's kernel log (dmesg)")]
    except Exception as error:  # whatever it is, it becomes a row of the table
        name = "" if isinstance(error, UserError | DataError | ModelError) else f"{type(error).__name__}: "
        return [CheckResult(check, Status.FAILED, f"{name}{error}")]


def check_node(
    place: Environment, device: torch.device, folder: Path, recipe: Recipe | None
) -> tuple[list[CheckResult], Facts]:
    """The checks of this rank's GPU (without a launcher, of all GPUs) and, on local rank 0, of the node."""
    facts: Facts = {}
    results: list[CheckResult] = []
    gpus = range(torch.cuda.device_count()) if place.launcher == "alone" else [device.index or 0]
    for index in gpus if device.type == "cuda" else ():
        results += run_check("GPU health", partial(_gpu_health, index))
        results += run_check("NVDEC", partial(_nvdec, index), NVDEC_TIMEOUT + TIMEOUT)
        if recipe is not None and recipe.engine.fp8:
            results += run_check("FP8", partial(_fp8, index))
    if place.local_rank == 0:
        ranks = place.local_world_size
        results += run_check("memory", lambda: _memory(ranks))
        results += run_check("disk", lambda: _disk(folder, recipe))
        results += run_check("/dev/shm", lambda: _shared_memory(ranks))
        results += run_check("versions", lambda: _versions(facts))
        if recipe is not None:
            results += run_check("manifests", lambda: _manifests(recipe, facts))
    return results, facts


def judge_gpu_count(seen: int, needed: int, ranks: int) -> CheckResult:
    """seen: GPUs that torch sees on the node. needed: by the run. ranks: on the node."""
    if seen < needed:
        advice = "nvidia-smi -L, dmesg for Xid errors; in the job, --gpus-per-node"
        return CheckResult("GPU count", Status.FAILED, f"torch sees {seen} of {needed} GPUs", advice)
    if needed and seen > ranks:
        advice = "start one rank per GPU: the others idle"
        return CheckResult("GPU count", Status.WARNING, f"{seen} GPUs, ranks: {ranks}", advice)
    return CheckResult("GPU count", Status.OK if seen else Status.SKIPPED, f"GPUs: {seen or 'none'}")


def _gpu_health(index: int) -> Iterator[CheckResult]:
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    values = query_smi("gpu", ("ecc.errors.uncorrected.volatile.total", "retired_pages.pending"), uuid)
    values |= query_smi("remapped-rows", ("remapped_rows.pending", "remapped_rows.failure"), uuid)
    yield judge_gpu(index, values, exact=multiplies_exactly(torch.device("cuda", index)))


def judge_gpu(index: int, values: Mapping[str, str], *, exact: bool) -> CheckResult:
    """values: from nvidia-smi. exact: whether products equal the CPU's."""
    errors = values.get("ecc.errors.uncorrected.volatile.total", "")
    bad = [] if exact else ["its products differ from the CPU's"]
    if errors.isdigit() and int(errors) > 0:
        bad.append(f"uncorrected memory errors: {errors}")
    if any(values.get(name) in ("Yes", "1") for name in ("retired_pages.pending", "remapped_rows.pending")):
        bad.append("a memory repair waits for a reset")
    if values.get("remapped_rows.failure") in ("Yes", "1"):
        bad.append("no spare memory is left for repairs")
    if bad:
        advice = "exclude the node; its administrators reset or replace the GPU"
        return CheckResult("GPU health", Status.FAILED, f"GPU {index}: {', '.join(bad)}", advice)
    return CheckResult("GPU health", Status.OK, "no errors" if values else "products exact; no nvidia-smi")


def _fp8(index: int) -> Iterator[CheckResult]:
    """Raises RunError where the GPU does not multiply in FP8."""
    check_fp8(torch.device("cuda", index))
    yield CheckResult("FP8", Status.OK, "products in FP8")


def _nvdec(index: int) -> Iterator[CheckResult]:
    """In a process of its own: a crash or a hang of the decoder must not end the preflight."""
    command = [sys.executable, "-m", SELFTEST_MODULE, f"cuda:{index}", "--frames", str(FRAMES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=NVDEC_TIMEOUT)
    yield judge_decoding(index, result.returncode, result.stdout, result.stderr)


def judge_decoding(index: int, code: int, output: str, errors: str) -> CheckResult:
    """From exit code and output of the decoder's self-test."""
    if code == 0:
        text = f"{json.loads(output)['frames']} of {FRAMES} frames"
        if text.startswith(f"{FRAMES} "):
            return CheckResult("NVDEC", Status.OK, f"H.264: {text}")
    else:
        text = (errors.strip().splitlines() or [""])[-1] if code > 0 else f"signal {-code}"
    advice = "in a container, NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; or data.decoder: pyav"
    return CheckResult("NVDEC", Status.FAILED, f"GPU {index}: {text}", advice)


def judge_space(check: str, free: int, least: int, wanted: int, advice: str) -> CheckResult:
    """Bytes: less than `least` fails, less than `wanted` warns."""
    if free >= max(least, wanted):
        return CheckResult(check, Status.OK, f"{format_bytes(free)} free")
    status = Status.FAILED if free < least else Status.WARNING
    return CheckResult(
        check, status, f"{format_bytes(free)} free of {format_bytes(max(least, wanted))} needed", advice
    )


def _memory(ranks: int) -> Iterator[CheckResult]:
    advice = f"reading and decoding take about {format_bytes(RESERVE['cpu'])} per rank; in the job, --mem"
    free = free_bytes(torch.device("cpu"), 1)
    yield judge_space("memory", free, ranks * LEAST_MEMORY, ranks * RESERVE["cpu"], advice)


def _disk(folder: Path, recipe: Recipe | None) -> Iterator[CheckResult]:
    temporary = tempfile.gettempdir()
    advice = f"clear {temporary}, or set TMPDIR to another folder: compilers and MLflow write there"
    yield judge_space("disk", shutil.disk_usage(temporary).free, MARGIN, TEMPORARY, advice)
    parents = (folder.absolute(), *folder.absolute().parents)
    free = shutil.disk_usage(next(path for path in parents if path.exists())).free
    size, number = (checkpoint_bytes(recipe), checkpoints_to_come(recipe, folder)) if recipe else (0, 0)
    advice = f"{number} more checkpoints of {format_bytes(size)} are due: free space, or use another folder"
    yield judge_space("disk", free, size + MARGIN, number * size + MARGIN, advice)


def _shared_memory(ranks: int) -> Iterator[CheckResult]:
    if Path("/dev/shm").is_dir():
        # DALI's workers hand over batches there, as many as are prefetched.
        advice = (
            f"DALI needs {format_bytes(AHEAD)} a rank; in a container, --ipc=host; or lower data.prefetch"
        )
        free = shutil.disk_usage("/dev/shm").free
        yield judge_space("/dev/shm", free, ranks * LEAST_SHARED, ranks * AHEAD, advice)


def _versions(facts: Facts) -> Iterator[CheckResult]:
    described = describe_environment()
    facts["versions"] = {"Python": described["python"], "torch": torch.__version__}
    for name, package in (("deepspeed", "deepspeed"), ("DALI", "nvidia-dali-cuda120")):
        facts["versions"][name] = described["packages"].get(package, "missing")
    text = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    is_complete = "missing" not in facts["versions"].values()
    yield CheckResult("versions", Status.OK if is_complete else Status.FAILED, text, "make install")


def _manifests(recipe: Recipe, facts: Facts) -> Iterator[CheckResult]:
    found = facts["manifests"] = {}
    for name, path in recipe.data.manifest_fields:
        found[f"{name} {path}"] = Manifest.open(path).fingerprint[:12] if path.exists() else "missing"
        if not path.exists() and recipe.data.embedded is None:
            advice = "mount the file system there, or make it with uniformerv2 prepare"
            yield CheckResult("manifests", Status.FAILED, f"{name}: {path} does not exist", advice)
    present = sum(value != "missing" for value in found.values())
    yield CheckResult("manifests", Status.OK, f"{present} of {len(found)} exist")

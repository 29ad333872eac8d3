"""What a node looks at in itself before a run, and how what it finds is judged.

A check is a function that returns results; `run_check` runs it with a time limit and turns what it raises
into a result. The verdicts are functions of numbers, apart from where the numbers come from.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from models import ModelError
from models.cost import parameter_count
from pipelines import SELFTEST_MODULE
from pipelines.autotune import AHEAD
from pipelines.dataset.manifest import Manifest
from pipelines.decode.nvdec import LIBRARY, has_nvdec
from pipelines.errors import DataError
from trainer.checkpoint.retention import MARGIN, Retention
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment, describe_environment
from trainer.engine.memory_estimate import GIB, RESERVE, free_bytes
from trainer.errors import UserError
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import model_config
from trainer.system.timeouts import run_with_timeout

T = TypeVar("T")

LIMIT = 60.0  # seconds for a check; each takes a second or so where all is well
DECODING_LIMIT = 120.0  # seconds: another process has to import DALI
QUERY_LIMIT = 30.0  # seconds that nvidia-smi has; it takes one, and hangs where a driver does
STATE_BYTES = 12  # of a parameter in a checkpoint: the weight and AdamW's two moments, in fp32
AVERAGE_BYTES = 4  # more where a moving average is kept
LEAST_MEMORY = GIB  # bytes a rank: importing the libraries and holding a batch takes about that
LEAST_SHARED = 2**27  # bytes a rank: a container's default of 64 MiB stops DALI's workers at the first batch
TEMPORARY = GIB  # bytes: what compilers and MLflow put there, with a wide margin
OWN_CONTEXT = 3 * GIB // 2  # bytes of a GPU that our own processes hold before they compute, at most
FRAMES = 16  # of the clip that NVDEC has to decode

_SLOWED = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}
"""Bits of the driver's reasons for a lower clock that a healthy GPU does not show."""


class Status(IntEnum):
    """Ordered: the worst of several is their maximum."""

    NOT_APPLICABLE = 0
    OK = 1
    WARNING = 2
    FAILED = 3

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class CheckResult:
    """What a check came to, on one node.

    check: its name. figure: in a few words, what was found. advice: what to do, where it is not ok. value:
    orders findings of one verdict, the least being the worst; None where there is no such order.
    """

    check: str
    verdict: Status
    text: str
    advice: str = ""
    value: float | None = None


Facts = dict[str, dict[str, str]]
"""By check and name, what must be the same on all nodes."""


def run_check(
    check: str, work: Callable[[], Iterable[CheckResult]], seconds: float = LIMIT
) -> list[CheckResult]:
    """The check's findings; one that breaks, or hangs, has failed with its reason."""
    try:
        return list(run_with_timeout(seconds, lambda: list(work()), check))
    except (UserError, DataError, ModelError) as error:
        return [CheckResult(check, Status.FAILED, str(error))]
    except TimeoutError as error:
        return [CheckResult(check, Status.FAILED, str(error), "see the node's kernel log (dmesg)")]
    except Exception as error:  # whatever it is, it is to be a row of the table
        return [CheckResult(check, Status.FAILED, f"the check broke: {type(error).__name__}: {error}")]


def check_node(
    place: Environment, device: torch.device, folder: Path, recipe: Recipe | None
) -> tuple[list[CheckResult], Facts]:
    """All that this rank looks at by itself: its GPU and, as the first of its node, the node.

    device: what this rank computes on. Alone, without a launcher, a rank looks at all GPUs that it sees.
    """
    facts: Facts = {}
    gpus = _gpus(place, device)
    findings: list[CheckResult] = []
    for index in gpus:
        facts["driver"] = {"CUDA": torch.version.cuda or "none"}
        findings += run_check("GPU health", partial(_gpu_health, index, facts["driver"]))
        findings += run_check("GPU memory", partial(_gpu_memory, index))
        findings += run_check("NVDEC", partial(_nvdec, index), DECODING_LIMIT + LIMIT)
    if place.local_rank > 0:
        return findings, {}
    if gpus:
        words = ", ".join(f"{name} {value}" for name, value in facts["driver"].items())
        findings.append(CheckResult("driver", Status.OK, words))
    else:
        for check in ("GPU health", "GPU memory", "NVDEC", "driver"):
            findings.append(CheckResult(check, Status.NOT_APPLICABLE, "no GPU is used here"))
    findings += run_check("memory", lambda: [judge_memory(free_bytes(_CPU, 1), place.local_world_size)])
    findings += run_check("disk", lambda: _run_disk(folder, recipe))
    findings += run_check("temporary disk", _temporary_disk)
    findings += run_check("/dev/shm", lambda: _shared_memory(place.local_world_size))
    findings += run_check("versions", lambda: _versions(facts))
    findings += run_check("manifests", lambda: _manifests(recipe, facts))
    return findings, facts


_CPU = torch.device("cpu")


def _gpus(place: Environment, device: torch.device) -> list[int]:
    if device.type != "cuda":
        return []
    return list(range(torch.cuda.device_count())) if place.launcher == "alone" else [device.index or 0]


def gpus_seen() -> list[str]:
    """What tells the GPUs apart that this rank's torch sees, whichever of them it uses."""
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def gpus_told() -> int:
    """How many GPUs nvidia-smi lists, where nobody has hidden them from torch."""
    if shutil.which("nvidia-smi") is None or "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=QUERY_LIMIT)
    return sum(line.startswith("GPU ") for line in said.stdout.splitlines())


def judge_gpu_count(seen: int, needed: int, ranks: int) -> CheckResult:
    """seen: by torch on this node. needed: that the run counts on. ranks: on this node."""
    check = "GPU count"
    if seen < needed:
        advice = "nvidia-smi -L, dmesg for Xid errors; in the job, --gpus-per-node"
        return CheckResult(check, Status.FAILED, f"torch sees {seen} of {needed} GPUs", advice, seen)
    if seen == 0:
        return CheckResult(check, Status.NOT_APPLICABLE, "no GPU here, and none asked for")
    if needed and seen > ranks:
        text = f"{seen} GPUs for {ranks} rank{'s' * (ranks > 1)}"
        return CheckResult(check, Status.WARNING, text, "start one rank per GPU: the others idle", seen)
    return CheckResult(check, Status.OK, f"{seen} GPU{'s' * (seen > 1)}", value=seen)


def _gpu_health(index: int, driver: dict[str, str]) -> Iterator[CheckResult]:
    """Also notes the driver's version."""
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    told = smi(
        "gpu", ("driver_version", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending"), uuid
    )
    told |= smi("remapped-rows", ("remapped_rows.pending", "remapped_rows.failure"), uuid)
    # Renamed with driver 535.
    told |= smi("gpu", ("clocks_event_reasons.active",), uuid) or smi(
        "gpu", ("clocks_throttle_reasons.active",), uuid
    )
    if "driver_version" in told:
        driver["driver"] = told["driver_version"]
    yield judge_gpu(index, told, right=product_is_right(torch.device("cuda", index)))


def smi(query: str, fields: tuple[str, ...], uuid: str) -> dict[str, str]:
    """What nvidia-smi says of one GPU, by field; empty where it is missing, or does not know a field."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = [
        "nvidia-smi",
        f"--query-{query}={','.join(('gpu_uuid', *fields))}",
        "--format=csv,noheader,nounits",
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT)
    return read_smi(said.stdout, fields, uuid) if said.returncode == 0 else {}


def read_smi(text: str, fields: tuple[str, ...], uuid: str) -> dict[str, str]:
    """The line of one GPU, by field."""
    for line in text.splitlines():
        first, *values = (value.strip() for value in line.split(","))
        if first == uuid:
            return dict(zip(fields, values, strict=True))
    return {}


def judge_gpu(index: int, told: Mapping[str, str], *, right: bool) -> CheckResult:
    """told: what nvidia-smi says, whatever of it there is. right: whether it multiplies as the CPU does."""
    check = "GPU health"
    errors = told.get("ecc.errors.uncorrected.volatile.total", "")
    bad = [] if right else ["its products differ from the CPU's"]
    if errors.isdigit() and int(errors) > 0:
        bad.append(f"{errors} uncorrected memory error{'s' * (errors != '1')}")
    if any(told.get(name) in ("Yes", "1") for name in ("retired_pages.pending", "remapped_rows.pending")):
        bad.append("a memory repair waits for a reset")
    if told.get("remapped_rows.failure") in ("Yes", "1"):
        bad.append("no spare memory is left for repairs")
    if bad:
        advice = "leave the node out; its administrators reset or replace the GPU"
        return CheckResult(check, Status.FAILED, f"GPU {index}: {', '.join(bad)}", advice)
    active = next((value for name, value in told.items() if name.endswith("reasons.active")), "")
    bits = int(active, 16) if active.startswith("0x") else 0
    slowed = dict.fromkeys(reason for bit, reason in _SLOWED.items() if bits & bit)
    if slowed:
        text = f"GPU {index}: clock lowered ({', '.join(slowed)})"
        return CheckResult(
            check, Status.WARNING, text, "all ranks wait for the slowest; see cooling and power"
        )
    return CheckResult(
        check, Status.OK, "products right" + (", no errors told" if told else "; no nvidia-smi")
    )


def product_is_right(device: torch.device) -> bool:
    """Multiply matrices of -1, 0 and 1, in fp32 and bf16: in both, sums of 256 such are exact."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-1, 2, shape, generator=generator).float() for shape in ((1024, 256), (256, 1024))
    )
    expected = left @ right
    for dtype in (torch.float32, torch.bfloat16):
        on_device = left.to(device, dtype), right.to(device, dtype)
        if not torch.equal((on_device[0] @ on_device[1]).float().cpu(), expected):
            return False
    return True


def _gpu_memory(index: int) -> Iterator[CheckResult]:
    yield judge_gpu_memory(index, *torch.cuda.mem_get_info(index))


def judge_gpu_memory(index: int, free: int, total: int) -> CheckResult:
    """Bytes. What is taken before the run began is somebody else's, up to our own processes' contexts."""
    taken = total - free
    if taken > OWN_CONTEXT:
        text = f"GPU {index}: {gib(taken)} of {gib(total)} taken before the run"
        return CheckResult(
            "GPU memory", Status.WARNING, text, "nvidia-smi names the processes that hold it", free
        )
    return CheckResult("GPU memory", Status.OK, f"{gib(free)} of {gib(total)} free", value=free)


def _nvdec(index: int) -> Iterator[CheckResult]:
    """In a process of its own: what crashes the decoder, or hangs it, must not end the doctor."""
    if not has_nvdec():
        advice = "in a container, NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; or data.decoder: pyav"
        yield CheckResult("NVDEC", Status.FAILED, f"{LIBRARY} cannot be loaded", advice)
        return
    command = [sys.executable, "-m", SELFTEST_MODULE, f"cuda:{index}", "--frames", str(FRAMES)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=DECODING_LIMIT)
    except subprocess.TimeoutExpired:
        yield judge_decoding(index, None, f"no end within {DECODING_LIMIT:g} s")
        return
    yield read_decoding(index, said.returncode, said.stdout, said.stderr)


def read_decoding(index: int, code: int, output: str, errors: str) -> CheckResult:
    """What the process came to that decodes on a GPU."""
    if code == 0:
        return judge_decoding(index, int(json.loads(output)["frames"]), "")
    lines = errors.strip().splitlines() or [""]
    return judge_decoding(index, None, lines[-1] if code > 0 else f"it died of signal {-code}")


def judge_decoding(index: int, frames: int | None, problem: str) -> CheckResult:
    """frames: that came of `FRAMES`, None where it did not get that far because of the problem."""
    if frames == FRAMES:
        return CheckResult("NVDEC", Status.OK, f"H.264: {frames} of {FRAMES} frames")
    text = problem if frames is None else f"{frames} of {FRAMES} frames came"
    return CheckResult("NVDEC", Status.FAILED, f"GPU {index}: {text}", "or train with data.decoder: pyav")


def judge_memory(free: int, ranks: int) -> CheckResult:
    """free: bytes of this node that may still be taken, control groups considered."""
    wanted, text = ranks * RESERVE["cpu"], f"{gib(free)} free for {ranks} rank{'s' * (ranks > 1)}"
    if free >= wanted:
        return CheckResult("memory", Status.OK, text, value=free)
    advice = f"reading and decoding take about {gib(wanted // ranks)} a rank; in the job, --mem"
    verdict = Status.FAILED if free < ranks * LEAST_MEMORY else Status.WARNING
    return CheckResult("memory", verdict, text, advice, free)


def judge_space(check: str, free: int, *, least: int, wanted: int, advice: str) -> CheckResult:
    """Bytes: less than `least` fails, less than `wanted` warns."""
    text = f"{gib(free)} free"
    if free >= max(least, wanted):
        return CheckResult(check, Status.OK, text, value=free)
    verdict = Status.FAILED if free < least else Status.WARNING
    return CheckResult(check, verdict, f"{text} of {gib(max(least, wanted))} needed", advice, free)


def _run_disk(folder: Path, recipe: Recipe | None) -> Iterator[CheckResult]:
    free = shutil.disk_usage(_existing(folder)).free
    if recipe is None:
        yield judge_space(
            "disk", free, least=MARGIN, wanted=GIB, advice="free space; --recipe tells what checkpoints need"
        )
        return
    one, number = checkpoint_bytes(recipe), checkpoints_to_come(recipe, folder)
    advice = (
        f"{number} checkpoint{'s' * (number > 1)} of {gib(one)} are to come: free space, or choose "
        "another folder"
    )
    yield judge_space("disk", free, least=one + MARGIN, wanted=number * one + MARGIN, advice=advice)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint of the recipe's model. Where the manifest is missing, the head counts as small."""
    path = recipe.data.train_manifests[0].manifest
    classes = len(Manifest.open(path).class_names) if path.exists() else 1
    each = STATE_BYTES + (AVERAGE_BYTES if recipe.optimisation.ema_decay is not None else 0)
    return parameter_count(model_config(recipe, classes)) * each


def checkpoints_to_come(recipe: Recipe, folder: Path) -> int:
    """How many more than there are: those kept, the best, and one that is written before another goes."""
    retention = Retention(
        RunDir(folder).checkpoints, keep_last=recipe.run.keep_last, keep_best=recipe.run.keep_best
    )
    return max(1, recipe.run.keep_last + 2 - len(retention.visible()))


def _temporary_disk() -> Iterator[CheckResult]:
    folder = tempfile.gettempdir()
    advice = f"clear {folder}, or point TMPDIR at another folder: compilers and MLflow write there"
    free = shutil.disk_usage(folder).free
    yield judge_space("temporary disk", free, least=MARGIN, wanted=TEMPORARY, advice=advice)


def _shared_memory(ranks: int) -> Iterator[CheckResult]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield CheckResult("/dev/shm", Status.NOT_APPLICABLE, "this system has none")
        return
    # Batches on their way from DALI's workers lie there, as many as are made ahead.
    advice = (
        f"clips made ahead lie there, up to {gib(AHEAD)} a rank: in a container, --ipc=host or --shm-size; "
        "or a smaller data.prefetch"
    )
    free = shutil.disk_usage(folder).free
    yield judge_space("/dev/shm", free, least=ranks * LEAST_SHARED, wanted=ranks * AHEAD, advice=advice)


def _versions(facts: Facts) -> Iterator[CheckResult]:
    described = describe_environment()
    packages = described["packages"]
    facts["versions"] = {
        "Python": described["python"],
        "torch": torch.__version__,
        "deepspeed": packages.get("deepspeed", "missing"),
        "DALI": packages.get("nvidia-dali-cuda120", "missing"),
    }
    text = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    if "missing" in facts["versions"].values():
        yield CheckResult("versions", Status.FAILED, text, "install as the other nodes are: make install")
    else:
        yield CheckResult("versions", Status.OK, text)


def _manifests(recipe: Recipe | None, facts: Facts) -> Iterator[CheckResult]:
    check = "manifests"
    if recipe is None:
        yield CheckResult(check, Status.NOT_APPLICABLE, "no --recipe, which names them")
        return
    named = [
        *(("data.train", part.manifest) for part in recipe.data.train_manifests),
        ("data.val", recipe.data.val),
    ]
    found = facts.setdefault(check, {})
    for name, path in named:
        there = path.exists()
        # Shortened: it is to be compared, and read.
        found[f"{name} {path}"] = Manifest.open(path).fingerprint[:12] if there else "missing"
        if not there and recipe.data.embedded is None:
            advice = "mount the file system there, or make it with uniformerv2 prepare"
            yield CheckResult(check, Status.FAILED, f"{name}: {path} is not there", advice)
    missing = "missing" in found.values()
    if not missing or recipe.data.embedded is not None:
        yield CheckResult(
            check, Status.OK, "to be rendered at the start" if missing else f"{len(found)} there"
        )


def _existing(path: Path) -> Path:
    """The path, or the closest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def gib(amount: int) -> str:
    return f"{amount / GIB:.1f} GiB" if amount >= GIB // 10 else f"{amount / 2**20:.0f} MiB"

"""The checks between nodes: the shared folder, and an all-reduce over all ranks.

Ranks exchange messages with rank 0 through the process group's key-value store, which has a connection from
each rank to rank 0. A broken link between two other nodes, or a broken NCCL, does not stop the messages.
"""

import json
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from trainer.cluster.preflight.checks import CheckResult, Status

FOLDER_TIMEOUT = 35.0  # seconds: an NFS client may cache a folder for 30
ANSWER_TIMEOUT = 10.0  # seconds for a message of a healthy rank
ALL_REDUCE_TIMEOUT = 120.0  # seconds; NCCL may take many to connect the nodes
SIZES = {"cuda": (2**26, 10), "cpu": (2**23, 2)}
"""By device: bytes per rank, and all-reduces that are timed."""


class ControlChannel:
    """Messages between rank 0 and all ranks; values are what JSON holds."""

    def __init__(self, rank: int, store: dist.Store | None = None) -> None:
        """store: the process group's, unless given."""
        self.rank = rank
        self._store = dist.PrefixStore("doctor", store or _get_default_store())

    def send(self, name: str, value: Any) -> None:
        """Send to rank 0."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def collect(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """On rank 0: the values by rank, without those that did not come in time."""
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        if not self._wait(list(keys.values()), seconds):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items()}

    def broadcast(self, name: str, value: Any) -> None:
        """On rank 0: send to all ranks."""
        self._store.set(name, json.dumps(value))

    def receive(self, name: str, seconds: float) -> Any:
        """A value that rank 0 broadcasts. Raises TimeoutError."""
        if not self._wait([name], seconds):
            raise TimeoutError(f"rank 0 sent no {name} within {seconds:g} s")
        return json.loads(self._store.get(name))

    def _wait(self, keys: list[str], seconds: float) -> bool:
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except dist.DistStoreError:
            return False
        return True


def check_shared_folder(
    channel: ControlChannel, folder: Path, others: Sequence[int], seconds: float = FOLDER_TIMEOUT
) -> dict[int, CheckResult]:
    """On rank 0: write a file, let the other nodes read it and write theirs, read these; results by rank.

    others: a rank of each other node, in `answer_folder_check`. Leaves the folder as it was.
    """
    token = secrets.token_hex(16)
    place = folder / "slurm" / f".preflight-{token}"
    created = [path for path in (place.parent, folder, *folder.parents) if not path.exists()]
    problems = {0: ""}
    try:
        place.mkdir(parents=True)
        (place / "0").write_text(token)
        channel.broadcast("folder", {"token": token, "ranks": list(others)})
        problems |= dict.fromkeys(others, f"no answer within {seconds:g} s")
        problems |= channel.collect("folder", others, seconds + ANSWER_TIMEOUT)
        for rank in others:
            if not problems[rank] and _read(place / str(rank)) != token:
                problems[rank] = "rank 0 does not see the file that it wrote"
    except OSError as error:
        channel.broadcast("folder", None)
        problems[0] = f"cannot write in {folder}: {error.strerror}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # another process wrote something, or the folder was never made
            for path in created:
                path.rmdir()
    advice = "the run directory must be on a file system that all nodes mount at the same path"
    return {
        rank: CheckResult("shared folder", Status.FAILED, problem, advice)
        if problem
        else CheckResult("shared folder", Status.OK, "written and read")
        for rank, problem in problems.items()
    }


def answer_folder_check(
    channel: ControlChannel, request: Any, folder: Path, seconds: float = FOLDER_TIMEOUT
) -> None:
    """On another node. request: that rank 0 broadcast."""
    if request is None or channel.rank not in request["ranks"]:
        return
    token, problem, deadline = request["token"], "", time.monotonic() + seconds
    place = folder / "slurm" / f".preflight-{token}"
    while (found := _read(place / "0")) != token and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        if found == token:
            (place / str(channel.rank)).write_text(token)
        else:
            problem = f"{folder} there does not hold what rank 0 wrote"
    except OSError as error:
        problem = f"cannot write in {folder}: {error.strerror}"
    channel.send("folder", problem)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def measure_all_reduce(device: torch.device, world_size: int, rank: int) -> tuple[float, int]:
    """Seconds of an all-reduce, and the wrong elements in its sum. Collective over all ranks."""
    group: Any = None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
        # NCCL's own timeout kills the process: it must come after the timeout of this check.
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=3 * ALL_REDUCE_TIMEOUT))
    size, repeats = SIZES[device.type]
    # Whole numbers that differ by rank and position: fp32 adds them exactly for some 5,000 ranks.
    positions = torch.arange(size // 4, device=device) % 7
    values = (positions + rank).float()
    expected = (world_size * positions + world_size * (world_size - 1) // 2).float()
    result, wrong, begun = values, 0, 0.0
    for repeat in range(repeats + 2):
        if repeat == 2:  # the first connects the ranks, the second aligns them
            int(result[0])  # waits for the GPU
            begun = time.perf_counter()
        result = values.clone()
        dist.all_reduce(result, group=group)
        if repeat == 0:
            wrong = int((result != expected).sum())
    int(result[0])
    seconds = (time.perf_counter() - begun) / repeats
    return seconds, max(wrong, int((result != expected).sum()))


def judge_all_reduce(
    answers: Mapping[int, Sequence[Any] | str], device: str, world_size: int, least: float | None
) -> dict[int, CheckResult]:
    """Results by rank; the slowest rank's time counts for all.

    answers: what `measure_all_reduce` returned, or an error; a rank may be missing. least: required GB/s.
    """
    size, times = SIZES[device][0], [float(one[0]) for one in answers.values() if not isinstance(one, str)]
    # Each of n ranks sends 2 (n - 1) / n of the bytes.
    rate = 2 * (world_size - 1) / world_size * size / max(times, default=float("inf")) / 1e9
    results = {}
    for rank in range(world_size):
        answer, status, text = answers.get(rank, "no answer"), Status.FAILED, f"{rate:.2f} GB/s of bus"
        advice = "check the network between the nodes: NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, firewalls"
        if isinstance(answer, str):
            text = answer
        elif answer[1]:
            text = f"{answer[1]} elements of the sum are wrong"
            advice = "exclude the node: a link or a GPU corrupts data"
        elif least is not None and rate < least:
            text = f"{text}, required {least:g}"
        else:
            status, text = Status.OK, f"{size >> 20} MiB at {text}"
        results[rank] = CheckResult("all-reduce", status, text, advice)
    return results

"""What nodes find out together before a run: a shared folder, clocks, the sum over all ranks.

Rank 0 asks, the others answer, all through the key-value store that the process group was met with: it lives
on rank 0 and has one connection to every rank, so nothing grows with the square of their number, and what is
broken between two other nodes, or in NCCL, does not keep the news of it from arriving.
"""

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from trainer.cluster.preflight.checks import CheckResult, Status

FOLDER_PATIENCE = 35.0  # seconds: an NFS client may hold on to its view of a folder for 30
ANSWER = 10.0  # seconds that a rank which is there takes at most to tell its time
CLOCK_ROUNDS = 3  # of which the quickest counts
CLOCK_WARNING, CLOCK_FAILED = 1.0, 60.0  # seconds
REDUCE_PATIENCE = 120.0  # seconds for all of the sums; NCCL may take many to find its ways between nodes
SIZES = {"cuda": ((2**20, 20), (2**26, 10)), "cpu": ((2**20, 3), (2**23, 2))}
"""Bytes that are added up over the ranks, and how often: a small message and a large one."""


class ControlChannel:
    """Between rank 0, which asks, and all ranks."""

    def __init__(self, rank: int, world_size: int, store: dist.Store | None = None) -> None:
        """store: that of the process group, where none is given."""
        self.rank = rank
        self.world_size = world_size
        self._store = dist.PrefixStore("doctor", store or _get_default_store())

    def give(self, name: str, value: Any) -> None:
        """This rank's answer; what JSON takes."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def collect(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """The ranks' answers, without those that did not come in time."""
        ranks = list(ranks)
        if not self._come([f"{name}/{rank}" for rank in ranks], seconds):
            ranks = [rank for rank in ranks if self._store.check([f"{name}/{rank}"])]
        values = self._store.multi_get([f"{name}/{rank}" for rank in ranks]) if ranks else []
        return dict(zip(ranks, map(json.loads, values), strict=True))

    def tell(self, name: str, value: Any) -> None:
        """Rank 0's word to all."""
        self._store.set(name, json.dumps(value))

    def hear(self, name: str, seconds: float) -> Any:
        """Rank 0's word; raises TimeoutError when it does not come."""
        if not self._come([name], seconds):
            raise TimeoutError(f"rank 0 said nothing about {name} within {seconds:g} s")
        return json.loads(self._store.get(name))

    def _come(self, keys: Sequence[str], seconds: float) -> bool:
        try:
            self._store.wait(list(keys), timedelta(seconds=seconds))
        except dist.DistStoreError:
            return False
        return True


@dataclass(frozen=True)
class FolderView:
    """What a node saw of a file that rank 0 wrote.

    seen: digest of the bytes, empty where there were none. problem: why there were none, or why the node
    could not write. wrote: digest of what the node wrote, empty where it did not. seconds: until it saw.
    """

    seen: str
    problem: str
    wrote: str
    seconds: float


def check_shared_folder(
    exchange: ControlChannel, folder: Path, others: Sequence[int], patience: float = FOLDER_PATIENCE
) -> dict[int, CheckResult]:
    """Rank 0's part: write, let the others read and write, read what they wrote; by rank, 0 included.

    others: one rank of each other node, which is in `answer_folder_check` or will be. Leaves the folder as it
    was.
    """
    name, there = f".preflight-{secrets.token_hex(8)}", _folders(folder)
    place = folder / "slurm" / name
    try:
        try:
            place.mkdir(parents=True)
            digest = _write(place / "0")
            mine = _digest(place / "0")
        except OSError as error:
            exchange.tell("folder", None)
            advice = "choose a folder that can be written, with --folder"
            text = f"cannot write in {folder}: {error.strerror}"
            return {0: CheckResult("shared folder", Status.FAILED, text, advice)}
        exchange.tell("folder", {"name": name, "digest": digest})
        found = {0: judge_folder_view(digest, FolderView(mine, "", digest, 0.0), digest, alone=not others)}
        answers = exchange.collect("folder", others, patience + ANSWER)
        for rank in others:
            if rank in answers:
                sight = FolderView(**answers[rank])
                # A node says so after it has written: no server or client knows the file as missing.
                found[rank] = judge_folder_view(digest, sight, _digest(place / str(rank)), alone=False)
            else:
                found[rank] = CheckResult(
                    "shared folder", Status.FAILED, f"no answer within {patience:g} s", _ADVICE
                )
        return found
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for made in (folder / "slurm", folder, *folder.parents):
            if made not in there:
                try:
                    made.rmdir()
                except OSError:  # somebody else wrote something, or it was never made
                    break


def answer_folder_check(
    exchange: ControlChannel, told: Any, folder: Path, patience: float = FOLDER_PATIENCE
) -> None:
    """The part of the other nodes. told: what rank 0 said about the folder."""
    if told is None:  # rank 0 could not write
        return
    place, begun, problem = folder / "slurm" / told["name"], time.monotonic(), ""
    pause = 0.05
    while (seen := _digest(place / "0")) != told["digest"] and time.monotonic() - begun < patience:
        time.sleep(pause)
        pause = min(1.0, 2 * pause)
    waited, wrote = time.monotonic() - begun, ""
    if seen:
        try:
            wrote = _write(place / str(exchange.rank))
        except OSError as error:
            problem = f"cannot write in {folder}: {error.strerror}"
    else:
        problem = f"{folder} there does not hold what rank 0 wrote"
    exchange.give("folder", vars(FolderView(seen, problem, wrote, waited)))


_ADVICE = "the run folder must lie on a file system that all nodes mount at the same path"


def judge_folder_view(digest: str, sight: FolderView, came_back: str, *, alone: bool) -> CheckResult:
    """digest: of what rank 0 wrote. came_back: of what rank 0 read of what the node wrote."""
    check = "shared folder"
    if sight.problem:
        return CheckResult(check, Status.FAILED, sight.problem, _ADVICE)
    if sight.seen != digest:
        return CheckResult(check, Status.FAILED, "other bytes than rank 0 wrote", _ADVICE)
    if came_back != sight.wrote:
        problem = (
            "rank 0 sees other bytes than it wrote" if came_back else "rank 0 does not see what it wrote"
        )
        return CheckResult(check, Status.FAILED, problem, _ADVICE)
    if alone:
        return CheckResult(check, Status.OK, "written and read; one node")
    when = f"after {sight.seconds:.1f} s" if sight.seconds >= 0.1 else "at once"
    return CheckResult(check, Status.OK, f"same bytes, {when}", value=-sight.seconds)


def _folders(folder: Path) -> set[Path]:
    """Those on the way to the run's folder of SLURM that are there already."""
    return {path for path in (folder / "slurm", folder, *folder.parents) if path.exists()}


def _write(path: Path) -> str:
    """Write random bytes; returns their digest."""
    data = secrets.token_bytes(256)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _digest(path: Path) -> str:
    """Empty where there is nothing to be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    return hashlib.sha256(data).hexdigest() if data else ""


def compare_clocks(
    exchange: ControlChannel, others: Sequence[int], patience: float, clock: Callable[[], float] = time.time
) -> dict[int, CheckResult]:
    """Rank 0's part: how far the others' clocks are off its own; by rank, 0 included.

    The other's time belongs to some moment between question and answer: the middle is taken, and half of the
    round trip is how wrong that can be. others: those that are in `tell_time`, or will be within `patience`
    seconds.
    """
    found = {0: CheckResult("clock", Status.OK, "the one that others are compared with")}
    if not others:
        return {0: CheckResult("clock", Status.NOT_APPLICABLE, "one node, one clock")}
    ready = exchange.collect("ready", others, patience)
    found |= {rank: _NO_TIME for rank in others if rank not in ready}
    for rank in ready:
        rounds: list[tuple[float, float]] = []
        for number in range(CLOCK_ROUNDS):
            asked, begun = clock(), time.perf_counter()
            exchange.tell(f"clock-{rank}-{number}", True)
            answer = exchange.collect(f"clock-{number}", [rank], ANSWER)
            if not answer:
                break
            trip = time.perf_counter() - begun
            rounds.append((trip / 2, answer[rank] - (asked + trip / 2)))
        found[rank] = judge_clock(*min(rounds)) if rounds else _NO_TIME
    return found


def tell_time(exchange: ControlChannel, wait: float, clock: Callable[[], float] = time.time) -> None:
    """The part of the other nodes. wait: seconds until rank 0 begins."""
    exchange.give("ready", True)
    for number in range(CLOCK_ROUNDS):
        exchange.hear(f"clock-{exchange.rank}-{number}", ANSWER if number else wait)
        exchange.give(f"clock-{number}", clock())


_NO_TIME = CheckResult("clock", Status.FAILED, "no answer", "see whether the node is alive")


def judge_clock(error: float, offset: float) -> CheckResult:
    """Seconds: half a round trip, and how far the node's clock is ahead of rank 0's."""
    size = abs(offset)
    text = f"{_seconds(size)} {'ahead' if offset > 0 else 'behind'}, ± {_seconds(error)}"
    if size - error > CLOCK_FAILED:
        advice = "start its NTP service: SLURM's munge and file systems refuse what is minutes off"
        return CheckResult("clock", Status.FAILED, text, advice, -size)
    if size + error > CLOCK_WARNING:
        advice = "see its NTP service (chronyc tracking): times in logs and of files cannot be compared"
        return CheckResult("clock", Status.WARNING, text, advice, -size)
    return CheckResult("clock", Status.OK, text, value=-size)


def _seconds(amount: float) -> str:
    return f"{amount:.1f} s" if amount >= 1 else f"{1000 * amount:.1f} ms"


@dataclass(frozen=True)
class AllReduceTiming:
    """bytes: that each rank had. seconds: for one sum over all ranks. wrong: elements that came out wrong."""

    bytes: int
    seconds: float
    wrong: int


def time_all_reduce(device: torch.device, world_size: int, rank: int) -> list[AllReduceTiming]:
    """Add up over all ranks, a small message and a large one. Collective: all ranks, or it never ends."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
        # NCCL kills the process at the end of its patience: not before it was told here that a sum is late.
        patience = timedelta(seconds=3 * REDUCE_PATIENCE)
        group = dist.new_group(backend="nccl", timeout=patience)
    else:
        group = None
    return [_reduce(device, world_size, rank, size, times, group) for size, times in SIZES[device.type]]


def _reduce(
    device: torch.device, world_size: int, rank: int, size: int, times: int, group: Any
) -> AllReduceTiming:
    values = _part(size // 4, rank, device)
    expected = sum_of_parts(size // 4, world_size, device)
    result = values.clone()
    dist.all_reduce(result, group=group)  # the first sets up connections
    wrong = int((result != expected).sum())
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # all begin together
    _finish(device)
    begun = time.perf_counter()
    for _ in range(times):
        result.copy_(values)
        dist.all_reduce(result, group=group)
    _finish(device)
    seconds = (time.perf_counter() - begun) / times
    return AllReduceTiming(size, seconds, max(wrong, int((result != expected).sum())))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _part(length: int, rank: int, device: torch.device) -> Tensor:
    """Whole numbers that tell ranks and places apart: fp32 adds them up exactly for some 5,000 ranks."""
    return (torch.arange(length, device=device) % 7 + rank).float()


def sum_of_parts(length: int, world_size: int, device: torch.device) -> Tensor:
    ranks = world_size * (world_size - 1) // 2
    return (world_size * (torch.arange(length, device=device) % 7) + ranks).float()


def judge_all_reduce(
    sums: Mapping[int, Sequence[AllReduceTiming]], world_size: int, least: float | None
) -> dict[int, CheckResult]:
    """By rank. The slowest rank's times count for all: no sum is there before its last part.

    least: GB/s of the bus that are asked for.
    """
    if not sums:
        return {}
    check, judged = "all-reduce", Status.OK
    small, large = (
        max((own[size] for own in sums.values()), key=lambda one: one.seconds) for size in (0, -1)
    )
    rate, advice = bus_bandwidth(large, world_size), ""
    text = (
        f"{small.bytes >> 20} MiB in {1000 * small.seconds:.2f} ms; "
        f"{large.bytes >> 20} MiB at {rate:.2f} GB/s of bus"
    )
    if least is not None and rate < least:
        judged = Status.FAILED
        advice = f"{least:g} GB/s were asked for: NCCL_DEBUG=INFO tells which network is used"
    found = dict.fromkeys(sums, CheckResult(check, judged, text, advice))
    for rank, own in sums.items():
        wrong = sum(one.wrong for one in own)
        if wrong:
            advice = "leave the node out: a link or a GPU changes what passes through it"
            text = f"{wrong} elements of the sum are wrong"
            found[rank] = CheckResult(check, Status.FAILED, text, advice)
    return found


def bus_bandwidth(one: AllReduceTiming, world_size: int) -> float:
    """GB/s through each rank's link, whatever the number of ranks: 2 (n - 1) / n of the bytes pass it."""
    return 2 * (world_size - 1) / world_size * one.bytes / one.seconds / 1e9

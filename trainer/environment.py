"""Who am I: rank, world size and device, found from whatever started this process.

Four ways in: the `deepspeed` launcher and `torchrun` (both set RANK, WORLD_SIZE, LOCAL_RANK), `srun`
(SLURM_PROCID and its kin), or nobody (one process alone). Whichever it was, afterwards the variables
that torch.distributed's `env://` reads are set.
"""

import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from pipelines.parallel import usable_cores
from trainer import RunError

Launcher = Literal["alone", "torchrun", "deepspeed", "variables", "srun"]

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM_PORTS = range(20000, 30000)  # below Linux's ephemeral ports (32768), above the well-known ones
_PACKAGES = (
    "torch",
    "deepspeed",
    "nvidia-dali-cuda120",
    "mlflow",
    "numpy",
    "av",
    "pyarrow",
    "pydantic",
    "open_clip_torch",
)


@dataclass(frozen=True)
class Environment:
    """A process's place among the ranks of a run."""

    rank: int
    """Number of this process among all, from 0."""
    local_rank: int
    """Number of this process among those on its node, from 0."""
    world_size: int
    """Processes in all."""
    local_world_size: int
    """Processes on this node."""
    device: torch.device
    """What this process computes on: its own GPU, or the CPU."""
    node: str
    """Name of this node: SLURM's, where it started the process, else the host's."""
    launcher: Launcher
    """What started the process; `variables` is somebody unknown who set RANK and the others."""
    node_rank: int = 0
    """Number of this node among those of the run, from 0."""
    nodes: tuple[str, ...] = ()
    """Each rank's node, where ranks lie on SLURM's nodes in order; empty where the launcher does not tell."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0


def find_environment(
    device: Literal["auto", "cpu", "cuda"] = "auto", variables: MutableMapping[str, str] = os.environ
) -> Environment:
    """Find this process's place and export what torch.distributed's `env://` needs.

    Args:
        device: the recipe's `engine.device`.
        variables: the process's environment; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR
            and MASTER_PORT are set in it.

    Raises:
        RunError: variables are missing, contradict each other or are no numbers (named in the message),
            or a GPU was asked for and is not there.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        rank, local_rank, world_size, local_world_size = _from_launcher(variables)
        launcher = _launcher(variables)
    elif _is_srun_task(variables):
        rank, local_rank, world_size, local_world_size = _from_srun(variables)
        # The job's script says where; without it, node names must resolve.
        variables["MASTER_ADDR"] = variables.get("MASTER_ADDR") or _slurm_address(
            variables["SLURM_STEP_NODELIST"]
        )
        variables.setdefault("MASTER_PORT", str(_slurm_port(variables)))
        launcher = "srun"
    else:
        rank, local_rank, world_size, local_world_size = 0, 0, 1, 1
        variables["MASTER_ADDR"] = "127.0.0.1"
        variables["MASTER_PORT"] = str(_free_port())
        launcher = "alone"
    _check_order(rank, local_rank, world_size, local_world_size, launcher)
    variables.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_world_size),
    )
    return Environment(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        device=_device(device, local_rank, launcher),
        launcher=launcher,
        **_nodes(variables, launcher, rank // local_world_size, world_size),
    )


def _launcher(variables: Mapping[str, str]) -> Launcher:
    if "TORCHELASTIC_RUN_ID" in variables:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in variables else "variables"


def _from_launcher(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    missing = [name for name in _LAUNCHED if name not in variables]
    if missing:
        present = [name for name in _LAUNCHED if name in variables]
        raise RunError(
            f"{', '.join(present)} set but {', '.join(missing)} not: start with `deepspeed`, `torchrun` or "
            f"`srun`, which set them all, or unset them to run alone"
        )
    world_size = _number(variables, "WORLD_SIZE")
    # The deepspeed launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in variables), "WORLD_SIZE")
    return (
        _number(variables, "RANK"),
        _number(variables, "LOCAL_RANK"),
        world_size,
        _number(variables, local),
    )


def _is_srun_task(variables: Mapping[str, str]) -> bool:
    """Whether `srun` started this process.

    Inside `sbatch` or `salloc`, without `srun`, SLURM_PROCID exists too: there the step's variables are
    missing, and the process is alone however many tasks the job asked for.
    """
    return "SLURM_PROCID" in variables and "SLURM_STEP_NODELIST" in variables


def _from_srun(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    # The step's count, where there is one: the job may have asked for more tasks than this srun starts.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    missing = [
        name
        for name in (tasks, "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
        if name not in variables
    ]
    if missing:
        raise RunError(
            f"SLURM_PROCID set but {', '.join(missing)} not: start with `srun`, which sets them all"
        )
    world_size = _number(variables, tasks)
    return (
        _number(variables, "SLURM_PROCID"),
        _number(variables, "SLURM_LOCALID"),
        world_size,
        _tasks_per_node(variables, world_size)[_number(variables, "SLURM_NODEID")],
    )


class _Nodes(TypedDict):
    node: str
    node_rank: int
    nodes: tuple[str, ...]


def _nodes(variables: Mapping[str, str], launcher: Launcher, number: int, world_size: int) -> _Nodes:
    """What there is to know of nodes; number: of this one, where the launcher does not say another."""
    # As SLURM calls it, under whatever launcher: its tools know the node by that name.
    node = variables.get("SLURMD_NODENAME") or socket.gethostname()
    if launcher != "srun":
        return _Nodes(node=node, node_rank=number, nodes=())
    hosts = expand_hosts(variables["SLURM_STEP_NODELIST"])
    counts = _tasks_per_node(variables, world_size)
    # Node after node, as SLURM lays ranks out unless told otherwise.
    nodes = tuple(name for name, count in zip(hosts, counts, strict=False) for _ in range(count))
    return _Nodes(
        node=node,
        node_rank=_number(variables, "SLURM_NODEID"),
        nodes=nodes if len(hosts) == len(counts) and len(nodes) == world_size else (),
    )


def _tasks_per_node(variables: Mapping[str, str], world_size: int) -> list[int]:
    """From SLURM's run-length list, such as `4(x2),3`."""
    counts: list[int] = []
    for part in variables.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def _slurm_address(nodelist: str) -> str:
    """Where rank 0 listens: loopback within one node, else the first node of the step.

    Raises:
        RunError: the node's name does not resolve, which torch.distributed would notice after minutes.
    """
    host = expand_hosts(nodelist)[0]
    if host == nodelist:
        return "127.0.0.1"
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise RunError(
            f"SLURM's first node {host!r} has no address here ({error}): "
            f"set MASTER_ADDR to the address of rank 0"
        ) from error
    return host


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: of `gpu[003-004,9],login1` they are gpu003, gpu004, gpu9, login1."""
    hosts: list[str] = []
    # Commas within brackets belong to a host's numbers.
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist):
        texts = [""]
        for plain, numbers in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", name):
            texts = [text + plain + number for text in texts for number in _expand_numbers(numbers)]
        hosts += texts
    return hosts


def _expand_numbers(numbers: str) -> list[str]:
    """`003-005,9` one by one; zeros at the beginning stay."""
    found: list[str] = []
    for part in numbers.split(","):
        low, _, high = part.partition("-")
        is_range = low.isdigit() and high.isdigit()
        found += [f"{n:0{len(low)}}" for n in range(int(low), int(high) + 1)] if is_range else [low]
    return found


def _slurm_port(variables: Mapping[str, str]) -> int:
    """A port all tasks of a step agree on without talking, unlike that of other steps on the same host."""
    seed = _number(variables, "SLURM_JOB_ID") * 16 + _number(variables, "SLURM_STEP_ID")
    # What had the port before may have it still: a job that is queued again takes another.
    seed += 7 * int(variables.get("SLURM_RESTART_COUNT") or 0)
    return _SLURM_PORTS[seed % len(_SLURM_PORTS)]


def job_end(variables: Mapping[str, str] = os.environ) -> float | None:
    """When SLURM will end this job, in seconds since 1970; None outside of one, or where it did not say.

    Raises RunError for a variable SLURM_JOB_END_TIME that is no number.
    """
    if "SLURM_JOB_END_TIME" not in variables:
        return None
    return float(_number(variables, "SLURM_JOB_END_TIME"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _number(variables: Mapping[str, str], name: str) -> int:
    try:
        value = int(variables[name])
    except ValueError:
        value = -1
    if value < 0:
        raise RunError(f"{name} is {variables[name]!r}; allowed: a whole number, at least 0")
    return value


def _check_order(rank: int, local_rank: int, world_size: int, local_world_size: int, launcher: str) -> None:
    for low, high in (
        (("RANK", rank), ("WORLD_SIZE", world_size)),
        (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_world_size)),
    ):
        if low[1] >= high[1]:
            raise RunError(
                f"{low[0]} is {low[1]} but {high[0]} is {high[1]} ({launcher}): it must be below it"
            )
    if local_world_size > world_size:
        raise RunError(
            f"LOCAL_WORLD_SIZE is {local_world_size} but WORLD_SIZE only {world_size} ({launcher})"
        )


def _device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int, launcher: Launcher) -> torch.device:
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise RunError("engine.device is cuda, but torch sees no GPU here; allowed: auto or cpu")
    if gpus == 1 and launcher == "srun":
        # With --gpus-per-task each task sees its own GPU only, as number 0.
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise RunError(
            f"LOCAL_RANK is {local_rank}, but torch sees {gpus} GPU(s) here: start at most {gpus} "
            f"process(es) per node, or set engine.device to cpu"
        )
    return torch.device("cuda", local_rank)


def cores_per_rank(environment: Environment) -> int:
    """What SLURM gave the rank's task, else this node's cores, divided among its ranks."""
    given = os.environ.get("SLURM_CPUS_PER_TASK") if environment.launcher == "srun" else None
    if given:  # where a task is bound to its cores, those are all that it sees
        return min(int(given), usable_cores())
    return max(1, usable_cores() // environment.local_world_size)


def describe() -> dict[str, Any]:
    """What a result depends on beside the recipe: versions, hardware, commit; ready to be written as JSON."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree this file lies in, `+changes` where files differ; None outside git."""
    source = str(Path(__file__).parent)
    try:
        head = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", source, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head

"""A process's rank, world size and device, from the launcher that started it.

The launcher is `deepspeed` or `torchrun` (both set RANK, WORLD_SIZE, LOCAL_RANK), an MPI launcher
(`distributed/mpi.py`), `srun` (`distributed/slurm_step.py`), or none: one process alone. `find_environment`
sets the variables that torch.distributed's `env://` reads.
"""

import os
import platform
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.worker_pool import usable_cores
from trainer.distributed.launchers import find_placement
from trainer.distributed.mpi import port_seed
from trainer.distributed.rank_placement import RankPlacement, read_number
from trainer.distributed.slurm_step import (
    cpus_per_task,
    not_by_srun,
    slurm_address,
    slurm_port,
)
from trainer.errors import RunError
from trainer.system.git import git_state

_MPI_PORTS = range(20000, 30000)  # below Linux's ephemeral ports
_DEFAULT_PORT = 29500  # torch.distributed's and the deepspeed launcher's
_PACKAGES = (
    "uniformerv2-trainer",
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


@dataclass(frozen=True, kw_only=True)
class Environment(RankPlacement):
    """A process's place among the ranks of a run."""

    device: torch.device
    """This process's own GPU, or the CPU."""
    node: str
    """Name of this node: SLURM's where SLURM started the process, else the host name."""
    node_rank: int = 0
    """Number of this node among those of the run, from 0."""

    @property
    def one_node(self) -> bool:
        """Whether all ranks are known to be on this node."""
        return self.world_size == 1 or (self.local_size_known and super().one_node)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes the run's files."""
        return self.rank == 0


def find_environment(
    device: Literal["auto", "cpu", "cuda"] = "auto", variables: MutableMapping[str, str] = os.environ
) -> Environment:
    """Find this process's placement and set the variables of torch.distributed's `env://`.

    Args:
        device: the recipe's `engine.device`.
        variables: the process's environment; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR
            and MASTER_PORT are set in it.

    Raises:
        RunError: variables are missing, contradict each other or are no numbers, or the recipe requires a GPU
            and there is none.
    """
    place = find_placement(variables)
    if place is None:
        notes = not_by_srun(variables)
        place = RankPlacement(0, 0, 1, 1, launcher="alone", starter="alone", notes=notes)
        variables["MASTER_ADDR"] = "127.0.0.1"
        variables["MASTER_PORT"] = str(free_port())
    else:
        place = _with_address(place, variables)
    variables.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
    )
    own = {
        "device": _device(device, place, variables),
        # SLURM's name under any launcher: `scontrol` and `sbatch` use it.
        "node": variables.get("SLURMD_NODENAME") or socket.gethostname(),
        "node_rank": place.rank // place.local_world_size if place.node_rank is None else place.node_rank,
    }
    return Environment(**{**vars(place), **own})


def _with_address(place: RankPlacement, variables: MutableMapping[str, str]) -> RankPlacement:
    """Set MASTER_ADDR and MASTER_PORT where the launcher did not. Raises RunError where nothing does."""
    given = variables.get("MASTER_ADDR")
    if given and place.launcher in ("srun", "mpi") and place.one_node and not _is_here(given):
        note = f"MASTER_ADDR={given} of the environment is ignored: all processes are on this node"
        place = replace(place, notes=(*place.notes, note))
        given = None
    if not given and place.launcher == "srun":
        # The job's script sets the address; without it, node names must resolve.
        given = "127.0.0.1" if place.one_node else slurm_address(variables["SLURM_STEP_NODELIST"])
    elif not given and place.one_node:
        given = "127.0.0.1"
    elif not given:
        raise RunError(
            f"{place.starter} started {place.world_size} processes on several nodes, and MASTER_ADDR is not "
            "set: set it to the name or address of rank 0's node, on all of them (mpirun -x MASTER_ADDR=NODE)"
        )
    variables["MASTER_ADDR"] = given
    if not variables.get("MASTER_PORT"):
        variables["MASTER_PORT"] = str(_port(place, variables))
    if read_number(variables, "MASTER_PORT", least=1) > 65535:
        raise RunError(f"MASTER_PORT is {variables['MASTER_PORT']!r}; allowed: a port, from 1 to 65535")
    return place


def _port(place: RankPlacement, variables: Mapping[str, str]) -> int:
    if place.launcher == "srun":
        return slurm_port(variables)
    seed = port_seed(variables)
    return _DEFAULT_PORT if seed is None else _MPI_PORTS[seed % len(_MPI_PORTS)]


def _is_here(address: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, target in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
            return True
    return False


def free_port() -> int:
    """A TCP port of the loopback address that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _device(
    wanted: Literal["auto", "cpu", "cuda"], place: RankPlacement, variables: Mapping[str, str]
) -> torch.device:
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise RunError("engine.device is cuda, but torch finds no GPU on this node; allowed: auto or cpu")
    bound = [gpu for gpu in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    if gpus == 1 and (place.launcher == "srun" or (place.launcher == "mpi" and len(bound) == 1)):
        # With --gpus-per-task, or a script that binds GPUs, each task sees its own GPU only, as number 0.
        return torch.device("cuda", 0)
    if place.local_rank >= gpus or (place.local_size_known and place.local_world_size > gpus):
        name, value = ("LOCAL_RANK", place.local_rank)
        if place.local_rank < gpus:  # all ranks of the node raise this, not only those without a GPU
            name, value = ("LOCAL_WORLD_SIZE", place.local_world_size)
        raise RunError(
            f"{name} is {value}, but torch finds {gpus} GPU(s) on this node: start at most {gpus} "
            f"process(es) per node, or set engine.device to cpu"
        )
    return torch.device("cuda", place.local_rank)


def cores_per_rank(environment: Environment) -> int:
    """The cores of the rank's SLURM task, else this node's cores divided by its ranks."""
    given = cpus_per_task(os.environ) if environment.launcher == "srun" else None
    if given:  # a task that is bound to its cores sees only these
        return min(given, usable_cores())
    return max(1, usable_cores() // environment.local_world_size)


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and commit, on which a result depends beside the recipe, as JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": None if (git := git_state()) is None else git.commit + "+changes" * git.dirty,
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

"""A task's placement in a SLURM step, from the variables that srun sets."""

import os
import re
import socket
from collections.abc import Mapping

from trainer.distributed.rank_placement import RankPlacement, read_number
from trainer.errors import RunError

_PORTS = range(20000, 30000)  # below Linux's ephemeral ports (32768), above the well-known ones
_MAX_HOSTS = 1_000_000  # of a node list: SLURM has at most 65,533 nodes
_COUNTS = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?")
_NO_END = {"", "NONE", "UNKNOWN", "UNLIMITED", "N/A", "0", "4294967294", "4294967295"}


def is_srun_task(variables: Mapping[str, str]) -> bool:
    """Whether `srun` started this process.

    Inside `sbatch` or `salloc`, without `srun`, SLURM_PROCID exists too, but not the step's variables: the
    process runs alone, whatever number of tasks the job requested.
    """
    return "SLURM_PROCID" in variables and "SLURM_STEP_NODELIST" in variables


def step_tasks(variables: Mapping[str, str]) -> int:
    """Number of tasks of the step; the job may have more. Raises RunError."""
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    _require(variables, name)
    return read_number(variables, name, least=1)


def find_srun_placement(variables: Mapping[str, str]) -> RankPlacement:
    """The task's placement.

    Raises RunError where variables are missing, are no numbers, or contradict each other.
    """
    world_size = step_tasks(variables)
    _require(variables, "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    rank = read_number(variables, "SLURM_PROCID")
    if rank >= world_size and _het_size(variables) > 1:
        # SLURM 22.05 numbers and counts over all components; versions that differ give no usable rank.
        raise RunError(
            f"SLURM_PROCID is {rank}, but the step has {world_size} tasks by SLURM_STEP_NUM_TASKS: in this "
            f"job of {_het_size(variables)} components (SLURM_HET_SIZE) tasks are numbered over all "
            "components, and counted in their own only. Start one component (srun --het-group=0), or set "
            "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each task"
        )
    hosts = expand_hosts(variables["SLURM_STEP_NODELIST"])
    counts, notes = _tasks_per_node(variables, len(hosts), world_size)
    node = read_number(variables, "SLURM_NODEID")
    if node >= len(counts):
        raise RunError(
            f"SLURM_NODEID is {node}, but the step's tasks are on {len(counts)} nodes "
            f"(SLURM_STEP_NODELIST={variables['SLURM_STEP_NODELIST']}): start with `srun`, whose variables "
            "agree"
        )
    # SLURM's default distribution: node after node.
    nodes = tuple(name for name, count in zip(hosts, counts, strict=False) for _ in range(count))
    return RankPlacement(
        rank=rank,
        local_rank=read_number(variables, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=counts[node],
        launcher="srun",
        starter="srun",
        local_size_known=not notes,
        node_rank=node,
        nodes=nodes if len(hosts) == len(counts) and len(nodes) == world_size else (),
        notes=notes,
    )


def not_by_srun(variables: Mapping[str, str]) -> tuple[str, ...]:
    """A note if the job has several tasks and this process was not started by srun, so that it runs alone."""
    text = variables.get("SLURM_NTASKS", "").strip()
    if not variables.get("SLURM_JOB_ID") or not text.isdigit() or int(text) < 2:
        return ()
    return (
        f"this process runs alone, although SLURM gave job {variables['SLURM_JOB_ID']} {text} tasks: start "
        "with `srun` to have a rank for each task",
    )


def _require(variables: Mapping[str, str], *names: str) -> None:
    missing = [name for name in names if name not in variables]
    if missing:
        raise RunError(
            f"SLURM_PROCID set but {', '.join(missing)} not: start with `srun`, which sets them all"
        )


def _het_size(variables: Mapping[str, str]) -> int:
    """Components of a heterogeneous job; 0 for other jobs. Before SLURM 20.02 they were called packs."""
    name = next((n for n in ("SLURM_HET_SIZE", "SLURM_PACK_SIZE") if variables.get(n)), None)
    return 0 if name is None else read_number(variables, name)


def _tasks_per_node(
    variables: Mapping[str, str], hosts: int, world_size: int
) -> tuple[list[int], tuple[str, ...]]:
    """The number of the step's tasks on each of its nodes, and a note if that was assumed.

    Raises RunError where SLURM's list is malformed or does not add up, or there is none.
    """
    name = "SLURM_STEP_TASKS_PER_NODE"
    if variables.get(name):
        counts = _counts(variables, name)
        if sum(counts) > world_size:
            raise RunError(
                f"{name} is {variables[name]!r}, {sum(counts)} in all, but the step has {world_size} tasks: "
                "start with `srun`, whose variables agree"
            )
        return counts, ()
    if hosts == 1:
        return [world_size], ()
    # The job's list, where the step has all of the job's nodes and tasks.
    if variables.get("SLURM_TASKS_PER_NODE"):
        counts = _counts(variables, "SLURM_TASKS_PER_NODE")
        if len(counts) == hosts and sum(counts) == world_size:
            return counts, ()
    if world_size % hosts == 0:
        each = world_size // hosts
        return [each] * hosts, (
            f"{name} is not set: the step's {world_size} tasks are assumed to be {each} on each of its "
            f"{hosts} nodes",
        )
    raise RunError(
        f"{name} is not set, and {world_size} tasks on {hosts} nodes have several distributions: start "
        f"with `srun`, which sets it, or set it, such as {name}={world_size - hosts + 1},1"
    )


def _counts(variables: Mapping[str, str], name: str) -> list[int]:
    """Parse SLURM's run-length list, such as `4(x2),3`. Raises RunError where it is malformed."""
    counts: list[int] = []
    for part in variables[name].split(","):
        match = _COUNTS.fullmatch(part.strip())
        if match is None or len(counts) + int(match[2] or 1) > _MAX_HOSTS:
            raise RunError(
                f"{name} is {variables[name]!r}; allowed: tasks of each node, such as 4(x2),3: start with "
                "`srun`, which sets it"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def slurm_address(nodelist: str) -> str:
    """The address at which rank 0 listens: loopback on one node, else the first node of the step.

    Raises:
        RunError: the node's name does not resolve; torch.distributed would raise only after minutes.
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


def slurm_port(variables: Mapping[str, str]) -> int:
    """A port that all tasks of a step compute alike, and that differs from other steps' on the same host."""
    seed = read_number(variables, "SLURM_JOB_ID") * 16 + read_number(variables, "SLURM_STEP_ID")
    # The previous attempt may still hold its port: a requeued job uses another.
    if variables.get("SLURM_RESTART_COUNT"):
        seed += 7 * read_number(variables, "SLURM_RESTART_COUNT")
    return _PORTS[seed % len(_PORTS)]


def find_job_end(variables: Mapping[str, str] = os.environ) -> float | None:
    """When SLURM will end this job, in seconds since 1970; None outside a job, or where SLURM gives no end.

    Raises RunError for a variable SLURM_JOB_END_TIME that is no number.
    """
    if variables.get("SLURM_JOB_END_TIME", "").strip().upper() in _NO_END:
        return None
    return float(read_number(variables, "SLURM_JOB_END_TIME"))


def cpus_per_task(variables: Mapping[str, str]) -> int | None:
    """Cores that SLURM gives each task; None where it is not set, or differs between components."""
    text = variables.get("SLURM_CPUS_PER_TASK", "").strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: `gpu[003-004,9],login1` gives gpu003, gpu004, gpu9, login1.

    Raises RunError for a list without a host, or with more hosts than SLURM supports.
    """
    hosts: list[str] = []
    # Commas within brackets belong to a host's numbers.
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist):
        texts = [""]
        for plain, numbers in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", name):
            expanded = _expand_numbers(numbers)
            if len(texts) * len(expanded) + len(hosts) > _MAX_HOSTS:
                raise RunError(f"the node list {nodelist!r} has more than {_MAX_HOSTS:,} nodes")
            texts = [text + plain + number for text in texts for number in expanded]
        hosts += texts
    if not any(host.strip() for host in hosts):
        raise RunError(f"SLURM_STEP_NODELIST is {nodelist!r}, which names no node: start with `srun`")
    return hosts


def _expand_numbers(numbers: str) -> list[str]:
    """`003-005,9` as 003, 004, 005, 9."""
    found: list[str] = []
    for part in numbers.split(","):
        low, _, high = part.partition("-")
        is_range = low.isdigit() and high.isdigit()
        if is_range and int(high) - int(low) >= _MAX_HOSTS:
            raise RunError(f"the nodes {numbers!r} of a node list are more than {_MAX_HOSTS:,}")
        found += [f"{n:0{len(low)}}" for n in range(int(low), int(high) + 1)] if is_range else [low]
    return found

"""A process's placement from the variables that MPI launchers and PMI servers set."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.distributed.rank_placement import RankPlacement, read_number
from trainer.errors import RunError


@dataclass(frozen=True)
class _Family:
    """The variables of a launcher; of `local_rank` and `local_size` the first that is set counts."""

    starter: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    serves_srun: bool = False
    """Whether srun also sets these variables for its own tasks."""


def _family(starter: str, prefix: str) -> _Family:
    local = f"{prefix}_LOCAL"
    return _Family(starter, f"{prefix}_RANK", f"{prefix}_SIZE", (f"{local}_RANK",), (f"{local}_SIZE",))


_FAMILIES = (
    _family("Open MPI's mpirun", "OMPI_COMM_WORLD"),
    _family("MVAPICH2's mpirun", "MV2_COMM_WORLD"),
    _family("MVAPICH's mpirun", "MVP_COMM_WORLD"),
    _family("jsrun", "JSM_NAMESPACE"),
    # MPICH's and Intel MPI's Hydra, Cray's PMI.
    _Family(
        "mpiexec (PMI)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        serves_srun=True,
    ),
)

JOB_NAMES = (
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
    "OMPI_MCA_orte_ess_jobid",
    "PBS_JOBID",
    "LSB_JOBID",
    "SLURM_JOB_ID",
)
"""Variables that name the job, the same for all its processes on all nodes."""


def find_mpi_placement(variables: Mapping[str, str], srun_tasks: int | None) -> RankPlacement | None:
    """The placement that an MPI launcher gave this process; None where none did.

    srun_tasks: number of tasks of the srun step that this process belongs to, or None. If the numbers agree,
    srun serves PMI itself, and started the process.

    Raises RunError where variables are missing, are no numbers, or contradict each other.
    """
    for family in _FAMILIES:
        present = [name for name in (family.rank, family.size) if variables.get(name)]
        if not present:
            continue
        if len(present) == 1:
            missing = family.size if present[0] == family.rank else family.rank
            if family.serves_srun and srun_tasks is not None:
                continue
            raise RunError(
                f"{present[0]} set but {missing} not: {family.starter} sets both; start with it, or unset "
                f"{present[0]}"
            )
        size = read_number(variables, family.size, least=1)
        if family.serves_srun and srun_tasks == size:
            return None
        return _place(variables, family, size)
    if variables.get("PMIX_RANK") and srun_tasks is None:
        raise RunError(
            f"PMIX_RANK is {variables['PMIX_RANK']}, but no variable gives the number of processes: "
            "start with `mpirun` of Open MPI, `srun`, `torchrun` or `deepspeed`, or set RANK, WORLD_SIZE, "
            "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
        )
    return None


def _place(variables: Mapping[str, str], family: _Family, size: int) -> RankPlacement:
    rank = read_number(variables, family.rank)
    local_rank = next((n for n in (*family.local_rank, "LOCAL_RANK") if variables.get(n)), None)
    local_size = next((n for n in (*family.local_size, "LOCAL_WORLD_SIZE") if variables.get(n)), None)
    if local_rank is None and size > 1:
        raise RunError(
            f"{family.rank} and {family.size} are set, but none of {', '.join(family.local_rank)}, so the "
            "local rank is unknown: set LOCAL_RANK and LOCAL_WORLD_SIZE for each "
            "process, or start with `torchrun`, `deepspeed` or `srun`"
        )
    return RankPlacement(
        rank=rank,
        local_rank=0 if local_rank is None else read_number(variables, local_rank),
        world_size=size,
        local_world_size=size if local_size is None else read_number(variables, local_size, least=1),
        launcher="mpi",
        starter=family.starter,
        local_size_known=local_size is not None,
    )


def port_seed(variables: Mapping[str, str]) -> int | None:
    """A number from the job's identifiers, the same on all its processes; None without identifiers."""
    names = [f"{name}={variables[name]}" for name in JOB_NAMES if variables.get(name)]
    if not names:
        return None
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:4])

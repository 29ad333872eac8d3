"""The content of a lock file, and whether its holder is still running."""

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError

from trainer.errors import RunError
from trainer.resilience.process_identity import boot_id, is_hidden, pid_namespace, start_ticks
from trainer.system import slurm

_RUNNING = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING"}
_ENDING = {"COMPLETING", "STAGE_OUT"}
_MAX_RECORD = 65536  # bytes of a lock file that are read
_JOB = re.compile(r"[0-9]{1,12}")
_NAMED_STEPS = {"4294967290": "interactive", "4294967291": "batch", "4294967292": "extern"}
"""Steps with a number in SLURM_STEP_ID and, except in old versions, a name in squeue."""
_LAST_STEP = 4294967280  # SLURM's SLURM_MAX_NORMAL_STEP_ID


class HolderState(Enum):
    """Whether a lock's holder is running."""

    GONE = "gone"
    ALIVE = "alive"
    UNKNOWN = "unknown"
    """Unknown, except by its heartbeat: the time of the lock file."""


@dataclass(frozen=True)
class LockRecord:
    """The content of a lock file."""

    token: str
    """Random, unique to this attempt."""
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    start: int | None
    """Start of the process in clock ticks since boot."""
    boot: str
    """Boot of the machine's kernel."""
    pid_namespace: str
    flock: bool
    """Whether the holder has a file lock on its file, which the kernel releases when the holder ends."""
    job: str | None
    """Number of the SLURM job."""
    step: str | None
    restart: int
    """Number of SLURM's restarts of the job."""
    cluster: str | None
    """SLURM's name of the cluster."""
    since: Annotated[float, Field(ge=0, lt=1e11)]
    """Start in seconds since 1970, by the holder's clock."""
    released: bool = False
    """Whether the run has ended and released the directory."""
    array_job: str | None = None
    """Number of the job's SLURM array."""
    array_task: str | None = None
    """Index of the job in its array."""

    @classmethod
    def own(cls, token: str, *, flock: bool, variables: Mapping[str, str] = os.environ) -> Self:
        """Of this process."""
        return cls(
            token=token,
            host=socket.gethostname(),
            pid=os.getpid(),
            start=start_ticks(os.getpid()),
            boot=boot_id(),
            pid_namespace=pid_namespace(),
            flock=flock,
            job=_numeral(variables.get("SLURM_JOB_ID")),
            step=_numeral(variables.get("SLURM_STEP_ID")),
            restart=int(_numeral(variables.get("SLURM_RESTART_COUNT")) or 0),
            cluster=variables.get("SLURM_CLUSTER_NAME") or None,
            since=round(time.time(), 3),
            array_job=_numeral(variables.get("SLURM_ARRAY_JOB_ID")),
            array_task=_numeral(variables.get("SLURM_ARRAY_TASK_ID")),
        )

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Parse a lock file, which anyone may have written; None if it is no whole record."""
        try:
            return TypeAdapter(cls).validate_json(text, strict=True)
        except ValidationError:
            return None

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def state(self, file: Path, variables: Mapping[str, str] = os.environ) -> HolderState:
        """Whether the holder is running, according to /proc, file lock and SLURM. file: its lock file."""
        if self.released:
            return HolderState.GONE
        here = self.boot != "" and self.boot == boot_id()
        if here and self.pid_namespace == pid_namespace():
            if self.start is None or is_hidden(self.pid):
                return HolderState.UNKNOWN
            now = start_ticks(self.pid)
            return HolderState.GONE if now is None or now != self.start else HolderState.ALIVE
        if here and self.flock:  # in another container on this machine
            return _by_flock(file)
        return self._by_slurm(variables)

    def _by_slurm(self, variables: Mapping[str, str]) -> HolderState:
        own = variables.get("SLURM_CLUSTER_NAME") or None
        job = self._job_id
        if job is None or _numeral(self.job) is None:
            return HolderState.UNKNOWN
        if own is not None and self.cluster is not None and own != self.cluster:
            return HolderState.UNKNOWN
        restart = int(_numeral(variables.get("SLURM_RESTART_COUNT")) or 0)
        if variables.get("SLURM_JOB_ID") == self.job and restart > self.restart:
            return HolderState.GONE  # SLURM ends all of a job before it restarts it
        if not slurm.is_available():
            return HolderState.UNKNOWN
        try:
            states = set(slurm.job_states(job))
            if not states & (_RUNNING | _ENDING):
                return HolderState.GONE
            if not states <= _RUNNING or self.step is None:
                return HolderState.UNKNOWN
            return self._by_steps(self.step, slurm.job_steps(job))
        except RunError:
            return HolderState.UNKNOWN

    @staticmethod
    def _by_steps(step: str, running: set[str]) -> HolderState:
        """Whether the holder's step is running."""
        if step in running or _NAMED_STEPS.get(step) in running:
            return HolderState.ALIVE
        # A missing step is gone only if squeue lists steps of this kind.
        listed = any(name.isdecimal() or name == "batch" for name in running)
        is_gone = listed and step.isdecimal() and int(step) <= _LAST_STEP
        return HolderState.GONE if is_gone else HolderState.UNKNOWN

    @property
    def _job_id(self) -> str | None:
        """The job's identifier in SLURM's commands; for an array task with the array's number."""
        if _numeral(self.array_job) is not None and _numeral(self.array_task) is not None:
            return f"{self.array_job}_{self.array_task}"
        return self.job

    @property
    def description(self) -> str:
        """The holder, for a message."""
        job = "" if self._job_id is None else f" of SLURM job {self._job_id}"
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, started {begun}"

    @property
    def advice(self) -> str:
        """The command that ends the holder."""
        return f"on {self.host}: kill {self.pid}" if self._job_id is None else f"scancel {self._job_id}"


def read_lock(file: Path) -> tuple[LockRecord | None, float]:
    """A lock file's record and its time by the file system's clock. Raises FileNotFoundError."""
    with open(file, "rb") as opened:  # opening it makes NFS query the server
        text = opened.read(_MAX_RECORD).decode(errors="replace")
        return LockRecord.read(text), os.fstat(opened.fileno()).st_mtime


def _by_flock(file: Path) -> HolderState:
    try:
        with open(file, "rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return HolderState.ALIVE
    except OSError:
        return HolderState.UNKNOWN
    return HolderState.GONE


def _numeral(text: str | None) -> str | None:
    return text if text is not None and _JOB.fullmatch(text) else None

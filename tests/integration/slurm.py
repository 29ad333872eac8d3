"""A real SLURM of two nodes on this machine, without systemd: munged, slurmctld and two slurmd of its own.

Everything is in one folder and listens on loopback only. Needs Debian's `slurm-wlm` and `munge`, and root.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
NODES = ("n1", "n2")
PATIENCE = 60.0  # seconds for the cluster itself to do something; a second or two is usual

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Two processes of a test are to run on a machine of any size.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing() -> list[str]:
    """The programs, or rights, that this machine lacks to start a SLURM; empty where nothing is missing."""
    found = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return found if found or os.geteuid() == 0 else ["root"]


class Cluster:
    """A context manager: inside, the cluster runs, and `variables` direct SLURM's commands to it."""

    def __init__(self, folder: Path) -> None:
        """folder: must not exist, and needs a short path for munge's socket."""
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        controller_port, first_port, second_port = _free_ports(3)
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0], folder=self.folder,
                controller_port=controller_port, first_port=first_port, second_port=second_port,
            )
        )  # fmt: skip
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        try:
            self._start(
                "munged", "--foreground", "--force", f"--key-file={key}",
                f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
                f"--seed-file={self.folder}/munged.seed", f"--log-file={self.folder}/munged.log",
            )  # fmt: skip
            self.wait_until(lambda: (self.folder / "munge.socket").exists(), "munged did not start")
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            self.wait_until(lambda: self.states() == ["idle", "idle"], "the nodes did not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the jobs, then the daemons."""
        try:
            if "slurmctld" in self._daemons:
                self.end_jobs()
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
            for daemon in self._daemons.values():
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self._daemons.clear()

    def end_jobs(self) -> None:
        """Cancel all jobs and wait until they are gone."""
        jobs = self.typed("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            self.typed("scancel", *jobs)  # one may be gone by now
            self.wait_until(lambda: not self.typed("squeue", "--noheader").stdout, "jobs do not end")

    def run(self, *command: str, variables: dict[str, str] | None = None) -> str:
        """The output of a command, stripped. Raises AssertionError when it fails."""
        result = self.typed(*command, variables=variables)
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout.strip()

    def typed(
        self, *command: str, variables: dict[str, str] | None = None, folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the environment of the cluster."""
        return subprocess.run(
            command, env={**os.environ, **self.variables, **(variables or {})}, cwd=folder,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def states(self) -> list[str]:
        """States of the nodes, such as `idle`, `alloc`, `down*`."""
        return self.run("sinfo", "--Node", "--noheader", "--format=%t").split()

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING; available for minutes after its end."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)["JobState"]

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, key=node)

    def dead_nodes(self) -> list[str]:
        return [node for node in NODES if node not in self._daemons]

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon, as a power cut does. The job's processes stay."""
        daemon = self._daemons.pop(node)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def wait_until(self, happened: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{problem} within {PATIENCE:.0f} s; {self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"{log.name}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log"))
        )

    def _start(self, *command: str, key: str | None = None) -> None:
        with open(self.folder / f"{key or command[0]}.output", "ab") as output:
            self._daemons[key or command[0]] = subprocess.Popen(
                # The kernel ends it if the tests are killed.
                ["setpriv", "--pdeathsig", "TERM", *command],
                env={**os.environ, **self.variables}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


def _free_ports(number: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()

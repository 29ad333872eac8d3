"""Starts real training processes, one per rank, as a launcher would."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent.parent
SMALL = Path(__file__).parent / "small.yaml"
PATIENCE = 240  # seconds; a run takes about 15 on an idle machine


def python_path() -> dict[str, str]:
    """PYTHONPATH with the project, for a script in another folder."""
    there = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *there])}


class Ended(AssertionError):
    """A process ended before the awaited event."""


@dataclass(frozen=True)
class Outcome:
    """Exit code, output and errors of rank 0."""

    code: int
    output: str
    errors: str


class Training:
    """A training run of one or more ranks, started at once."""

    def __init__(
        self, run_dir: Path, *arguments: str, data: Path, ranks: int = 1, recipe: Path = SMALL,
        variables: dict[str, str] | None = None, script: Path = ROOT / "launch/train.py",
    ) -> None:  # fmt: skip
        command = [
            sys.executable,
            str(script),
            "--recipe",
            str(recipe),
            "--run-dir",
            str(run_dir),
        ]
        for name in ("train", "val"):
            command += ["--set", f"data.{name}={data / name}.arrow"]
        command += arguments
        self.run_dir = run_dir
        self.processes: list[subprocess.Popen[bytes]] = []
        # Files instead of pipes: a rank that writes much does not block.
        self._outputs: list[tuple[IO[bytes], IO[bytes]]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            placed = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            outputs = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            self._outputs.append(outputs)
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        "OMP_WAIT_POLICY": "passive",  # else waiting threads take most of the time
                        **(placed if ranks > 1 else {}),
                        **(variables or {}),
                    },
                    stdout=outputs[0],
                    stderr=outputs[1],
                    start_new_session=True,
                )
            )

    def wait(self) -> Outcome:
        """Wait for all ranks, and kill those that do not end by themselves.

        Raises TimeoutError, with the last output of all ranks, where a rank was killed.
        """
        deadline = time.monotonic() + PATIENCE
        late = []
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
        self._end()
        if late:
            output = "\n".join(
                f"rank {rank}:\n{self._printed(rank, 0)[-2000:]}\n{self._printed(rank, 1)[-4000:]}"
                for rank in range(len(self.processes))
            )
            raise TimeoutError(f"ranks {late} did not end within {PATIENCE} s\n{output}")
        return Outcome(self.processes[0].returncode, self._printed(0, 0), self._printed(0, 1))

    def _end(self) -> None:
        """Kill the remaining ranks with their child processes."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)

    def _printed(self, rank: int, stream: int) -> str:
        """The output (0) or the errors (1) of a rank so far."""
        file = self._outputs[rank][stream]
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has recorded this step."""
        self.wait_until(lambda: any(event["step"] >= step for event in events(self.run_dir, "step")))

    def wait_until(self, happened: Callable[[], bool], pause: float = 0.02) -> None:
        """Wait until `happened` returns True. Raises Ended when the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if happened():
                return
            if any(process.poll() is not None for process in self.processes) and not happened():
                raise Ended(self.wait())
            time.sleep(pause)
        self._end()
        raise TimeoutError("it never happened")

    def signal(self, number: int, *, group: bool = False, rank: int = 0) -> None:
        """Send a signal to a rank, or with its child processes, as a terminal does.

        Raises Ended when it has ended.
        """
        if self.processes[rank].poll() is not None:
            raise Ended(f"rank {rank} had ended with {self.processes[rank].returncode}")
        send = os.killpg if group else os.kill
        send(self.processes[rank].pid, number)

    def kill(self, rank: int) -> None:
        """Kill a rank, and end the others as a launcher does.

        Raises Ended when the rank had ended by itself.
        """
        self.signal(signal.SIGKILL, rank=rank)
        code = self.processes[rank].wait(30)
        others = [process for number, process in enumerate(self.processes) if number != rank]
        for process in others:
            process.terminate()
        for process in others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        self._end()
        if code != -signal.SIGKILL:
            raise Ended(f"rank {rank} had ended with {code}")

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted((self.run_dir / "checkpoints").glob("step-*"))

    def is_saving(self) -> bool:
        return any((self.run_dir / "checkpoints").glob(".step-*.partial"))


def train(run_dir: Path, *arguments: str, data: Path, ranks: int = 1, **more: Any) -> Outcome:
    """Run a training to its end."""
    return Training(run_dir, *arguments, data=data, ranks=ranks, **more).wait()


def settings(**values: Any) -> Sequence[str]:
    """`optimisation__steps=3` → `--set optimisation.steps=3`."""
    return [
        part for name, value in values.items() for part in ("--set", f"{name.replace('__', '.')}={value}")
    ]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The run's events of a kind, without an incomplete last line."""
    path = run_dir / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in events(run_dir, "step")]


def typed(
    *command: str, folder: Path, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with the environment's programs on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=1200,
    )

"""Real ranks for tests: processes of one process group, which run functions of a test's module."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE = 240.0  # seconds; what takes longer hangs
MEETING_MINUTES = 5.0  # that ranks wait for one another: longer than PATIENCE, which tells where they hang

_given_up = ""  # why no more ranks are started


class RankError(AssertionError):
    """What went wrong in some rank, with its traceback."""


class Ranks:
    """So many ranks, each a process that has joined the process group. To be used as a context.

    The ranks stay between calls, so that what takes seconds happens once. A rank that fails or dies ends all.
    Once ranks have come to no end, those of later tests are not waited for as long again: they fail at once.
    """

    def __init__(self, world_size: int, device: str = "cpu") -> None:
        """device: `cpu`, or `cuda` for ranks with a GPU each, whose results are the same bits each time."""
        self.world_size = world_size
        self.device = device
        self.processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._stacks: list[Path] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module's function in every rank; returns what each returned, by rank.

        Raises RankError, after ending all ranks, when one raised, died or came to no end.
        """
        self.start(function, *arguments)
        return self.results()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin what `results` ends."""
        if not self.processes:
            self._begin()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))

    def results(self) -> list[Any]:
        """As `run` returns and raises them."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < self.world_size:
            waiting = [rank for rank in range(self.world_size) if rank not in found]
            ready = connection.wait([self._pipes[rank] for rank in waiting], deadline - time.monotonic())
            if not ready:
                words = f"ranks {waiting} came to no end within {PATIENCE:.0f} s"
                stacks = self._where(waiting)
                self.end()
                give_up(words, stacks)
            for rank in waiting:
                if self._pipes[rank] in ready:
                    try:
                        went_well, found[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                    except EOFError:
                        went_well, found[rank] = False, "it died"
                    if not went_well:
                        self.end()  # the others may wait for it in a collective
                        raise RankError(f"rank {rank} of {self.world_size}: {found[rank]}")
        return [found[rank] for rank in range(self.world_size)]

    def end(self) -> None:
        """Kill all ranks and wait until they are gone; the next call begins with new ones."""
        processes, stacks = self.processes, self._stacks
        self.processes, self._pipes, self._stacks = [], [], []
        for file in stacks:
            file.unlink(missing_ok=True)
        end_all(processes)

    def _begin(self) -> None:
        # What has used a GPU, or only counted them, cannot be copied.
        context = prepared_context() if self.device == "cpu" else multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            descriptor, stacks = tempfile.mkstemp(prefix=f"rank-{rank}-", suffix=".stacks")
            os.close(descriptor)
            self._stacks.append(Path(stacks))
            arguments = rank, self.world_size, port, theirs, stacks, self.device
            process = context.Process(target=_serve, args=arguments, daemon=True)
            begin(process)
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def _where(self, ranks: Sequence[int]) -> str:
        """The stacks of all threads of these ranks."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGUSR2)
        time.sleep(2)
        told = [self._stacks[rank].read_text() or "it does not say where it is\n" for rank in ranks]
        return "".join(f"rank {rank}:\n{stacks}" for rank, stacks in zip(ranks, told, strict=True))


def prepared_context() -> Any:
    """Makes processes that are copies of one which has imported what takes seconds, as DeepSpeed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
            "functorch.compile", "safetensors.torch", "pytest", "trainer.run",
            "tests.trainer.checkpoint.training",
        ]
    )  # fmt: skip
    # A process that forks must have one thread: a lock which another thread held would stay locked in the
    # copy. pyarrow's memory allocator would start one.
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, variables, JE_ARROW_MALLOC_CONF="background_thread:false"):
        forkserver.ensure_running()
    return context


def begin(process: Any) -> None:
    """Start a process of `prepared_context`. Raises RankError when it does not come within PATIENCE."""
    if _given_up:
        raise RankError(f"not started, for an earlier test hung: {_given_up}")
    failure: list[Exception] = []

    def start() -> None:
        try:
            process.start()
        except Exception as error:
            failure.append(error)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    starting.join(PATIENCE)
    if starting.is_alive():
        threads = _threads_of_server()
        _kill_server()  # which ends the waiting for its word
        give_up(f"no process was forked within {PATIENCE:.0f} s by a process with the threads {threads}")
    if failure:
        raise RankError("no process was forked") from failure[0]


def end_all(processes: Sequence[Any]) -> None:
    """Kill processes of `prepared_context`. Raises RankError when they are not gone soon."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(30)
    left = [process.pid for process in processes if process.is_alive()]
    if left:
        threads = _threads_of_server()
        _kill_server()
        give_up(f"of processes {left} nothing was heard after they were killed; the server ran {threads}")


def give_up(words: str, more: str = "") -> None:
    """Raise RankError, and let all later ranks fail with the same words."""
    global _given_up
    _given_up = _given_up or f"{words}, in {os.environ.get('PYTEST_CURRENT_TEST', 'some test')}"
    raise RankError(f"{words}\n{more}")


def _server() -> int:
    return forkserver._forkserver._forkserver_pid or 0  # type: ignore[attr-defined]


def _threads_of_server() -> list[str]:
    try:
        return [task.read_text().strip() for task in Path(f"/proc/{_server()}/task").glob("*/comm")]
    except OSError:
        return []


def _kill_server() -> None:
    if _server():
        os.kill(_server(), signal.SIGKILL)
        os.waitid(os.P_PID, _server(), os.WEXITED | os.WNOWAIT)  # multiprocessing itself asks how it ended


def _serve(
    rank: int, world_size: int, port: int, pipe: connection.Connection, stacks: str, device: str
) -> None:
    # It stays open for as long as the process lives: a signal's handler writes into it.
    faulthandler.register(signal.SIGUSR2, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from trainer.distributed.environment import find_environment
    from trainer.engine.process_group import connect

    torch.set_num_threads(1)
    environment = find_environment(device)  # type: ignore[arg-type]
    if device == "cuda":
        from trainer.system.device import set_device, set_numerics

        os.environ.pop("DS_ACCELERATOR", None)
        set_device(environment.device)
        set_numerics(deterministic=True)
    connect(environment, patience=MEETING_MINUTES, rendezvous=MEETING_MINUTES)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the test's process is gone
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port

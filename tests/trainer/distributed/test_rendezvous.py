"""Ranks that come, late or never: real processes."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.trainer.ranks import PATIENCE, begin, end_all, free_port, prepared_context
from trainer.distributed.environment import Environment
from trainer.distributed.rendezvous import format_missing_ranks, wait_for_all_ranks
from trainer.engine.process_group import connect
from trainer.system.formatting import format_ranges

LIMIT = 3.0  # seconds
NODES = ("n1", "n1", "n2")


class Meeting:
    """Processes that come to one port as ranks of three."""

    def __init__(self) -> None:
        self.port = free_port()
        self.processes: dict[Any, Any] = {}
        self._waiting: list[Any] = []

    def come(self, rank: int, *, nodes: tuple[str, ...] = (), name: Any = None, **how: Any) -> None:
        """Have a rank come, with all others called since it was last asked what became of any.

        `what_became_of` asks for it by `name`, else by its number.
        """
        ours, theirs = prepared_context().Pipe()
        here = {"rank": rank, "port": self.port, "nodes": nodes, **how}
        process = prepared_context().Process(target=_come, args=(theirs, here), daemon=True)
        begin(process)
        theirs.close()
        self.processes[rank if name is None else name] = process, ours
        self._waiting.append(ours)

    def _begin(self) -> None:
        """Processes take seconds to start, one more than another: none begins before all have."""
        for pipe in self._waiting:
            assert pipe.poll(PATIENCE)
            pipe.recv()
        for pipe in self._waiting:
            pipe.send("come")
        self._waiting = []

    def await_arrival(self, *ranks: int) -> None:
        """Wait until ranks have come that are to wait for others."""
        self._begin()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            time.sleep(0.1)
        store = dist.TCPStore("127.0.0.1", self.port, None, False, wait_for_workers=False)
        store.wait([f"rendezvous/3/present/{rank}" for rank in ranks], timedelta(seconds=PATIENCE))

    def what_became_of(self, name: Any) -> tuple[str, str]:
        """`met` and the sum over all ranks; or the error's class and words."""
        self._begin()
        _, pipe = self.processes[name]
        assert pipe.poll(PATIENCE)
        answer: tuple[str, str] = pipe.recv()
        return answer


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    meeting = Meeting()
    yield meeting
    end_all([process for process, _ in meeting.processes.values()])


def _come(
    pipe: Any,
    here: dict[str, Any],
) -> None:
    rank, port, nodes = here["rank"], here["port"], here["nodes"]
    environment = Environment(
        rank=rank,
        local_rank=0,
        world_size=3,
        local_world_size=3 if here.get("one_node") else 1,
        device=torch.device("cpu"),
        node=here.get("node") or (nodes[rank] if nodes else "somewhere"),
        launcher="srun" if nodes else "variables",
        starter="a launcher",
        nodes=nodes,
    )
    os.environ.update(
        MASTER_ADDR=here.get("address", "127.0.0.1"), MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3"
    )
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    pipe.send("ready")
    pipe.recv()
    time.sleep(here.get("delay", 0.0))
    try:
        if here.get("connects"):
            connect(environment, rendezvous=LIMIT / 60)
        else:
            store = wait_for_all_ranks(environment, "127.0.0.1", port, here.get("limit", LIMIT))
            dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=3)
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)
        where = f", at {' '.join(listened_at())}" if here.get("tells_where") else ""
        outcome = "met", f"{int(total)}{where}"
    except Exception as error:
        outcome = type(error).__name__, str(error)
    pipe.send(outcome)
    pipe.recv()  # rank 0 hosts the store: it stays until the test is over


def listened_at() -> set[str]:
    """The addresses at which this process waits for TCP connections."""
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder's own is closed meanwhile
            own.add(os.readlink(link))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in own:
                # Words of 32 bits, each with its lowest byte first.
                words = struct.iter_unpack("<I", bytes.fromhex(local.partition(":")[0]))
                found.add(socket.inet_ntop(family, b"".join(struct.pack(">I", word) for (word,) in words)))
    return found


def test_ranks_of_one_node_listen_on_loopback_and_deepspeed_takes_their_group(meeting: Meeting) -> None:
    """Whoever reaches a run's store can end it. A job's script names the node, not loopback."""
    for rank in range(3):
        meeting.come(rank, connects=True, one_node=True, address=socket.gethostname(), tells_where=True)
    assert [meeting.what_became_of(rank) for rank in range(3)] == [("met", "6, at 127.0.0.1")] * 3


@pytest.mark.parametrize(
    "delays", [(0.0, 0.0, 0.0), (0.0, 1.0, 2.0), (2.0, 0.0, 0.0)], ids=["at once", "late", "rank 0 latest"]
)
def test_all_come(meeting: Meeting, delays: tuple[float, ...]) -> None:
    for rank, delay in enumerate(delays):
        meeting.come(rank, delay=delay)
    assert [meeting.what_became_of(rank) for rank in range(3)] == [("met", "6")] * 3


def test_a_rank_that_never_comes_is_named_on_all_that_came(meeting: Meeting) -> None:
    meeting.come(0)
    meeting.come(2)
    (kind, words), other = meeting.what_became_of(0), meeting.what_became_of(2)
    assert (kind, words) == other
    assert kind == "MissingRanksError"
    assert words.startswith("2 of 3 ranks ") and "within 0.05 minutes: missing rank 1." in words
    assert "run.rendezvous_minutes" in words


def test_so_is_its_node_where_slurm_tells_it(meeting: Meeting) -> None:
    meeting.come(0, nodes=NODES)
    meeting.come(1, nodes=NODES)
    (_, words), other = meeting.what_became_of(0), meeting.what_became_of(1)
    assert words == other[1]
    assert "node n2: rank 2." in words
    assert "sbatch --exclude=n2" in words


def test_no_node_is_blamed_where_ranks_lie_otherwise_than_expected(meeting: Meeting) -> None:
    meeting.come(0, nodes=NODES)
    meeting.come(1, nodes=NODES, node="n2")
    _, words = meeting.what_became_of(0)
    assert "missing rank 2" in words
    assert "node" not in words and "exclude" not in words


def test_without_rank_0_the_others_name_the_place_and_both_causes(meeting: Meeting) -> None:
    meeting.come(2, nodes=NODES)
    kind, words = meeting.what_became_of(2)
    assert kind == "StartAgain"
    assert "rank 2 (n2)" in words and f"rank 0 at 127.0.0.1:{meeting.port}" in words
    assert "refused" in words
    assert "rank 0 of n1" in words and "MASTER_PORT" in words


@contextmanager
def listener(port: int) -> Iterator[None]:
    """Something that takes connections and never says a word."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("0.0.0.0", port))
        taken.listen()
        yield


def test_a_port_that_something_else_has(meeting: Meeting) -> None:
    with listener(meeting.port):
        meeting.come(0, connects=True)
        meeting.come(1, connects=True)
        kind, words = meeting.what_became_of(0)
        assert kind == "RunError"
        assert f"the ranks cannot meet at 127.0.0.1:{meeting.port}" in words and "--master_port" in words
        kind, words = meeting.what_became_of(1)
        assert kind == "StartAgain"
        assert "something listens there, but does not answer as rank 0 does" in words


def test_another_run_s_rank_is_told_from_one_s_own(meeting: Meeting) -> None:
    meeting.come(0, limit=60.0)
    meeting.come(1, limit=60.0)
    meeting.await_arrival(0, 1)
    meeting.come(1, name="another")
    kind, words = meeting.what_became_of("another")
    assert kind == "RunError"
    assert f"another run at 127.0.0.1:{meeting.port}" in words
    meeting.come(2, limit=60.0)
    assert [meeting.what_became_of(rank) for rank in range(3)] == [("met", "6")] * 3


def test_a_rank_0_that_dies_meanwhile_is_not_waited_for(meeting: Meeting) -> None:
    meeting.come(0, limit=100.0)
    meeting.come(1, limit=100.0)
    meeting.await_arrival(0, 1)
    meeting.processes[0][0].kill()
    kind, words = meeting.what_became_of(1)
    assert kind == "StartAgain"
    assert "rank 1 (" in words and "rank 0 at" in words


def test_words_for_a_thousand_ranks_stay_short() -> None:
    nodes = [f"n{rank // 8}" for rank in range(1000)]
    words = format_missing_ranks([*range(8), *range(17, 1000)], 1000, 600, nodes)
    assert words.startswith("991 of 1000 ranks ") and "within 10 minutes: " in words
    assert " node n1: ranks 8-15; " in words
    assert "of node n2: rank 16." in words
    assert "sbatch --exclude=n1," in words
    many = format_missing_ranks(range(500), 1000, 600, nodes)
    assert "and 55 more nodes" in many and "exclude" not in many
    assert len(many) < 700


def test_ranges() -> None:
    assert [format_ranges(numbers) for numbers in ([3], [0, 1, 2, 5, 7, 8], [])] == ["3", "0-2, 5, 7-8", ""]


def test_a_run_alone_needs_no_certain_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process took the port that was free a moment before."""
    environment = Environment(0, 0, 1, 1, "alone", "alone", device=torch.device("cpu"), node="node")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = int(other.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", str(taken))
        store = wait_for_all_ranks(environment, "127.0.0.1", taken, LIMIT)
        store.set("key", "value")
        assert store.get("key") == b"value"
        assert int(os.environ["MASTER_PORT"]) != taken

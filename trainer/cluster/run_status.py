"""How a run stands, judged by what lies in its folder and by its job in SLURM's queue.

No more is claimed than is known. A run tells of its steps, of its end and of leaving early; a process that is
killed tells nothing, and then the age of its last event is all there is. Where SLURM says that a job is
running, it is; where the run was started by hand, silence beyond its usual pace makes it `unknown`.

Nothing here may fail on what it reads: a file may be damaged, of another version, or just being written.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.accuracies import Accuracies
from trainer.cluster.first_failure import first_crash_report
from trainer.cluster.slurm import QueuedJob
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import find_number, parse_records

State = Literal[
    "running", "waiting", "requeued", "stopped", "given up", "failed", "unknown", "finished"
]  # fmt: skip

LEAST_PATIENCE = 60.0  # seconds of silence that mean nothing
MOST_PATIENCE = (
    1800.0  # that any pause may take, such as an evaluation; a hang is ended sooner (run.hang_minutes)
)
STARTING = 600.0  # seconds to the first step: data is looked at, workers start, kernels are compiled

PENDING_REASONS = {
    "Resources": "all nodes that suit it are in use",
    "Priority": "other jobs come first",
    "BeginTime": "its begin time has not come; a job that is queued again waits for two minutes",
    "Dependency": "another job has to end first",
    "DependencyNeverSatisfied": "the job it was to follow ended otherwise: it will never start",
    "ReqNodeNotAvail": "a node it needs is away or reserved; `sinfo -R` says why",
    "PartitionNodeLimit": "it asks for more nodes than its partition may give: it will never start",
    "PartitionTimeLimit": "it asks for more time than its partition may give: it will never start",
    "PartitionConfig": "its partition does not allow what it asks for: it will never start",
    "BadConstraints": "no node has what it asks for: it will never start",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes no jobs now",
    "JobHeldUser": "held by its user; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "its array runs no more tasks at once",
    "Reservation": "its reservation has not begun",
    "Licenses": "it waits for licences",
    "None": "SLURM has not looked at it yet",
}
_WAITS_BY_BEGINNING = {
    "QOS": "a limit of its QOS",
    "Assoc": "a limit of its account",
    "MaxJobs": "a limit on the number of jobs",
}

_ALIVE = {"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT"}

Record = Mapping[str, Any]
Verdict = tuple[State, str]


@dataclass(frozen=True)
class RunStatus:
    """One run at a glance.

    words: why it is in that state, empty where nothing is to be said. step, total_steps: None where they were
    never told. seconds_left: that the remaining steps take at the latest pace, evaluations and saves
    included, but no waiting in a queue. loss: of the last step; None, and `diverged` set, where it is not
    finite. top1: of the last evaluation, 0..1. job, nodes: the latest; a run by hand has no job, and one
    node, its host. silent: seconds since the last sign of life.
    """

    name: str
    folder: str
    state: State
    words: str
    step: int | None
    total_steps: int | None
    seconds_left: float | None
    restarts: int
    loss: float | None
    diverged: bool
    top1: float | None
    job: str | None
    nodes: str
    silent: float | None


class RunHistory:
    """What a run's folder says; of its events the last."""

    def __init__(self, path: Path) -> None:
        self.folder = RunDir(path)
        self.problems: list[str] = []
        self.events = [
            event
            for event in self._read(self.folder.events, self.folder.read_latest_events)
            if _is_told(event, "event")
        ]
        if not self.events and not self.problems and _size(self.folder.events):
            self.problems.append("events.jsonl holds no whole line at its end")
        self.turns = self._lines(path / "slurm" / "turns.jsonl", "turn")
        self.submitted = self._lines(path / "slurm" / "jobs.jsonl", "job")

    def _lines(self, path: Path, kind: str) -> list[Record]:
        found = self._read(
            path, lambda: list(parse_records(path.read_text(encoding="utf-8", errors="replace")))
        )
        return [line for line in found if _is_told(line, kind) and isinstance(line.get("job"), str)]

    def _read(self, path: Path, read: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        try:
            return read()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.problems.append(f"{path.name} cannot be read: {error.strerror or error}")
            return []

    @cached_property
    def jobs(self) -> list[str]:
        """SLURM's numbers, in the order that they came up."""
        lines = sorted([*self.submitted, *self.turns], key=lambda line: line["time"])
        return list(dict.fromkeys(str(line["job"]) for line in lines))

    def last(self, *kinds: str) -> Record | None:
        """The last event of one of these kinds."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), None)

    @property
    def turn(self) -> Record | None:
        """The last line on a turn of a job, unless the run was started by hand since."""
        if not self.turns:
            return None
        last = self.turns[-1]
        by_hand = last["turn"] == "ended" and self.events and self.events[-1]["time"] > last["time"]
        return None if by_hand else last

    @property
    def latest_job(self) -> str | None:
        """That the run is, or was last, in the hands of; None for a run by hand."""
        lines = [*self.submitted, *self.turns]
        if self.turns and self.turn is None:  # by hand since, unless it was submitted once more
            lines = [job for job in self.submitted if job["time"] > self.events[-1]["time"]]
        return str(max(lines, key=lambda line: line["time"])["job"]) if lines else None

    @cached_property
    def begun(self) -> float | None:
        """When the last start began, as far as that is among the latest events."""
        start = self.last("start")
        return None if start is None else float(start["time"])

    @property
    def sign_of_life(self) -> float | None:
        """When the run, or the script of its job, last said something."""
        return max((float(line["time"]) for line in (*self.events[-1:], *self.turns[-1:])), default=None)

    @cached_property
    def pace(self) -> float | None:
        """Seconds from step to step, with all that a run does between them; from one start to the next there
        is no such pair.
        """
        seconds = steps = 0.0
        before: Record | None = None
        for event in self.events:
            if event["event"] == "start":
                before = None
            if event["event"] != "step":
                continue
            took, came = (_difference(event, before, key) for key in ("spent", "step"))
            if before is not None and took is not None and came is not None and took >= 0 and came > 0:
                seconds, steps = seconds + took, steps + came
            before = event
        return seconds / steps if steps else None

    @property
    def patience(self) -> float:
        """Seconds of silence that are usual at this run's pace, and with its longest pause so far."""
        times = [
            float(event["time"]) for event in self.events if self.begun is None or event["time"] >= self.begun
        ]
        pauses = [after - before for before, after in pairwise(times)]
        patience = max(
            LEAST_PATIENCE, 10 * (self.pace or 0.0), min(2 * max(pauses, default=0.0), MOST_PATIENCE)
        )
        last = self.events[-1]["event"] if self.events else "start"
        return max(patience, STARTING) if last == "start" else patience

    def is_starting(self, now: float) -> bool:
        """Whether a process has prepared the folder lately and told no event since."""
        try:
            prepared = self.folder.environment.stat().st_mtime
            told = self.folder.events.stat().st_mtime if self.folder.events.exists() else 0.0
        except OSError:
            return False
        return prepared > told and now - prepared <= STARTING

    def failure(self) -> str | None:
        """What the latest start failed by, if a rank left word of it."""
        since = self.begun
        if since is None:  # longer ago than the events that are looked at
            since = float(self.events[0]["time"]) if self.events else 0.0
        try:
            hang = self.folder.path / "hangs" / "summary.txt"
            if hang.exists() and hang.stat().st_mtime >= (self.sign_of_life or 0.0):
                return _first_line(hang.read_text(encoding="utf-8", errors="replace"))
            noted = first_crash_report(self.folder.path, since)
        except (OSError, TypeError):
            return None
        return None if noted is None else _first_line(noted)


def derive_status(
    name: str, history: RunHistory, queue: Mapping[str, QueuedJob] | None, now: float
) -> RunStatus:
    """How a run stands, all told.

    Args:
        name: that it is shown under.
        evidence: from its folder.
        queue: SLURM's, by the job's number; None where SLURM was not asked or did not answer.
        now: seconds since 1970.
    """
    queued = _queued(history, queue)
    state, words = _judge(history, queue, queued, now)
    last = history.sign_of_life
    step, total = _latest(history, "step"), _latest(history, "total_steps")
    left = None
    if state != "finished" and history.pace is not None and step is not None and total is not None:
        left = max(0.0, (total - step) * history.pace)
    told = history.last("step")
    job = history.latest_job if queued is None else queued.id
    return RunStatus(
        name=name,
        folder=str(history.folder.path),
        state=state,
        words=_joined(words, *history.problems),
        step=None if step is None else int(step),
        total_steps=None if total is None else int(total),
        seconds_left=None if left is None else round(left, 1),
        restarts=_restarts(history),
        loss=None if told is None else find_number(told, "loss", most=math.inf),
        diverged=told is not None and "loss" in told and told["loss"] is None,
        top1=_top1(history),
        job=job,
        nodes=_nodes(history, queued, job),
        silent=None if last is None else round(max(0.0, now - last), 1),
    )


def is_gone(history: RunHistory, queue: Mapping[str, QueuedJob] | None) -> bool:
    """Whether the folder waits for a word of a job that has left the queue: it may have come meanwhile."""
    if queue is None or history.latest_job is None or _queued(history, queue) is not None:
        return False
    turn = history.turn
    return turn is None or turn["turn"] == "begun" or turn["job"] != history.latest_job


def _queued(history: RunHistory, queue: Mapping[str, QueuedJob] | None) -> QueuedJob | None:
    """The run's job in the queue: of several, as of a chain, the one that runs, else the first."""
    found = [queue[job] for job in history.jobs if job in queue] if queue else []
    return next((job for job in found if job.state in _ALIVE), found[0] if found else None)


def _judge(
    history: RunHistory, queue: Mapping[str, QueuedJob] | None, queued: QueuedJob | None, now: float
) -> Verdict:
    turn = history.turn
    closing = history.last("start", "end")
    is_done = closing is not None and closing["event"] == "end"
    if is_done and (turn is None or turn["turn"] == "ended" or turn["time"] <= history.events[-1]["time"]):
        return "finished", ""
    if queued is not None:
        return _in_queue(history, queued, now)
    if history.latest_job is None:
        return _by_hand(history, now)
    if turn is None or turn["job"] != history.latest_job:
        return _never_begun(history, queue is not None, now)
    if turn["turn"] == "ended":
        return _after(turn, in_vain=queue is not None)
    if queue is None:
        return _by_hand(history, now)
    words = f"job {turn['job']} is gone from the queue and left no word: killed, or its node was lost"
    return "failed", history.failure() or words


def _in_queue(history: RunHistory, queued: QueuedJob, now: float) -> Verdict:
    turn = history.turn
    own = turn if turn is not None and turn["job"] == queued.id else None
    if queued.state not in _ALIVE:
        why = _why(queued)
        if own is None:
            return "waiting", why
        if own["turn"] == "ended":
            return "requeued", _joined(_first_line(str(own.get("words", ""))), why)
        return "requeued", f"its last turn ended without a word, as when a node is lost; {why}"
    if queued.state != "RUNNING":
        return "running", f"SLURM says {queued.state.lower()}"
    if own is None or own["turn"] == "ended":
        return "running", "its turn begins or ends just now"
    if not history.events or history.events[-1]["time"] < own["time"]:
        return "running", f"starting for {duration(now - own['time'])}"
    leaving, silence = history.events[-1], now - history.events[-1]["time"]
    if leaving["event"] == "left":
        return "running", f"leaving: stopped by {leaving.get('reason')}"
    return "running", f"silent for {duration(silence)}" if silence > history.patience else ""


def _never_begun(history: RunHistory, asked: bool, now: float) -> Verdict:
    if asked:
        return "unknown", "its job left the queue before it began: cancelled, or its script failed at once"
    # A damaged line may hide that it was submitted, and show a turn of it.
    age = duration(now - max(line["time"] for line in (*history.submitted, *history.turns)))
    return "waiting", f"submitted {age} ago; only SLURM knows more"


def _after(turn: Record, *, in_vain: bool) -> Verdict:
    """After a turn's end, with its job not in the queue, as far as that is known.

    in_vain: whether SLURM was asked for it.
    """
    words, job = _first_line(str(turn.get("words", ""))), turn["job"]
    match turn.get("verdict"):
        case "done":
            return "finished", ""
        case "stopped":
            return "stopped", words
        case "given up":
            return "given up", words
        case "requeued":
            return (
                ("unknown", f"{words}; job {job} is not in the queue again")
                if in_vain
                else ("requeued", words)
            )
        case "left to the next job":
            return ("stopped", f"{words}; the queue holds no next job") if in_vain else ("waiting", words)
    return "unknown", words


def _by_hand(history: RunHistory, now: float) -> Verdict:
    """From the folder alone."""
    if history.is_starting(now):
        return "running", "starting"
    if history.sign_of_life is None:
        return "unknown", "" if history.problems else "it has told nothing yet"
    last = history.last("start", "step", "left", "failed")
    if last is not None and last["event"] == "left" and last is history.events[-1]:
        return "stopped", f"by {last.get('reason')}"
    if last is not None and last["event"] == "failed":
        return "failed", _first_line(str(last.get("words", "")))
    if (failure := history.failure()) is not None:
        return "failed", failure
    silence = now - history.sign_of_life
    if silence > history.patience:
        return "unknown", f"silent for {duration(silence)}"
    return "running", "starting" if last is None or last["event"] == "start" else ""


def _why(queued: QueuedJob) -> str:
    """Why a job waits, in plain words beside SLURM's."""
    if queued.state != "PENDING":
        return f"SLURM says {queued.state.lower()}"
    word = queued.reason.partition(",")[0].strip("() ")
    known = PENDING_REASONS.get(word) or next(
        (text for beginning, text in _WAITS_BY_BEGINNING.items() if word.startswith(beginning)), None
    )
    return queued.reason if known is None else f"{known} ({queued.reason})"


def _restarts(history: RunHistory) -> int:
    """Begun turns of jobs count, and what the run itself knows: each misses what the other saw."""
    kinds = [event["event"] for event in history.events]
    told = history.last("step")
    starts = 0
    if told is not None:
        after = kinds[len(kinds) - kinds[::-1].index("step") :]
        starts = int(find_number(told, "starts") or 1) + after.count("start")
    turns = sum(turn["turn"] == "begun" for turn in history.turns)
    return max(starts, kinds.count("start"), turns, 1) - 1


def _top1(history: RunHistory) -> float | None:
    """Of the last evaluation, which may be longer ago than the latest events."""
    told = history.last("evaluation")
    if told is not None:
        return find_number(told, "top1")
    known = Accuracies(history.folder.checkpoints).known()
    return known[max(known)] if known else None


def _nodes(history: RunHistory, queued: QueuedJob | None, job: str | None) -> str:
    if queued is not None:
        return queued.nodes
    if job is not None:
        return next((str(turn["nodes"]) for turn in reversed(history.turns) if turn.get("nodes")), "")
    try:
        described = json.loads(history.folder.environment.read_text(encoding="utf-8"))
        return str(described["hostname"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _latest(history: RunHistory, key: str) -> float | None:
    found = (
        find_number(event, key)
        for event in reversed(history.events)
        if event["event"] in ("start", "step", "left")
    )
    return next((value for value in found if value is not None), None)


def _difference(after: Record, before: Record | None, key: str) -> float | None:
    values = find_number(after, key), None if before is None else find_number(before, key)
    return None if values[0] is None or values[1] is None else values[0] - values[1]


def _is_told(line: Record, kind: str) -> bool:
    return isinstance(line.get(kind), str) and find_number(line, "time") is not None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _joined(*words: str) -> str:
    return "; ".join(word for word in words if word)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def duration(seconds: float, figures: int = 2) -> str:
    """`45s`, `12m`, `3h04m`, `2d03h`; with one figure `3h`, `2d`."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes}m" if minutes else f"{whole}s"
    if days == 0:
        return f"{hours}h{minutes % 60:02d}m" if figures > 1 else f"{hours}h"
    return f"{days}d{hours % 24:02d}h" if figures > 1 else f"{days}d"

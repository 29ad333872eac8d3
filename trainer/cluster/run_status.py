"""The status of a run, derived from its run directory and its job in SLURM's queue.

A killed process records nothing: the run lock's heartbeat shows whether a run without a job is running.
Files may be damaged, half written or of another version: nothing here raises an error for their content.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.retention import read_accuracies
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.crash_report import first_crash_report
from trainer.resilience.run_lock import STALE, is_holder_dead_here, read_holder_times
from trainer.system.files import find_number, parse_records, read_json
from trainer.system.formatting import format_age
from trainer.system.slurm import QueuedJob

State = Literal["running", "waiting", "requeued", "stopped", "given up", "failed", "unknown", "finished"]

_ALIVE = {"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT"}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunStatus:
    """The status of one run; None for what was never recorded."""

    name: str
    folder: str
    state: State
    reason: str
    step: int | None
    total_steps: int | None
    seconds_left: float | None
    """of the remaining steps at the latest pace, with evaluations and saves, without time in a queue"""
    restarts: int
    loss: float | None
    """of the last step; None where it is not finite"""
    diverged: bool
    top1: float | None
    """of the last evaluation, 0..1"""
    job: str | None
    """SLURM's number of the latest job; None for a run by hand"""
    nodes: str
    """of that job, as SLURM writes it; of a run by hand its host"""
    silent: float | None
    """seconds since the run, or its job's script, last recorded something"""


class RunHistory:
    """What a run directory records: the latest events, and the submissions and attempts of jobs."""

    def __init__(self, path: Path) -> None:
        self.folder = RunDir(path)
        self.problem = ""
        self.events: list[Record] = []
        try:
            self.events = [line for line in self.folder.read_latest_events() if _is_valid(line, "event")]
            if not self.events and self.folder.events.exists() and self.folder.events.stat().st_size:
                self.problem = "events.jsonl holds no whole line at its end"
        except OSError as error:
            self.problem = f"events.jsonl cannot be read: {error.strerror or error}"
        self.event: Record = self.events[-1] if self.events else {"event": "", "time": -math.inf}
        """the last one"""
        self.lines = read_job_lines(path)
        self.attempts = [line for line in self.lines if "turn" in line]

    @cached_property
    def attempt(self) -> Record | None:
        """The last line of an attempt; None where the run was started by hand since."""
        last = self.attempts[-1] if self.attempts else None
        is_over = last is not None and last["turn"] == "ended" and self.event["time"] > last["time"]
        return None if is_over else last

    @property
    def latest_job(self) -> str | None:
        """The job of the latest submission or attempt; None where the run was started by hand since."""
        is_by_hand = self.attempts and self.attempt is None
        jobs = [line["job"] for line in self.lines if not is_by_hand or line["time"] > self.event["time"]]
        return jobs[-1] if jobs else None

    @property
    def last_recorded(self) -> float | None:
        """When the run, or the script of its job, last recorded something, in seconds since 1970."""
        return max((float(line["time"]) for line in (*self.events[-1:], *self.attempts[-1:])), default=None)

    def last(self, *kinds: str) -> Record:
        """The last event of one of these kinds; empty where there is none."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), {})

    def latest(self, key: str) -> float | None:
        """The latest value of a field of steps."""
        lines = (line for line in reversed(self.events) if line["event"] in ("start", "step", "left"))
        return next((value for line in lines if (value := find_number(line, key)) is not None), None)

    @cached_property
    def pace(self) -> float | None:
        """Seconds per step since the latest start, with all that the run does in between."""
        starts = [number for number, event in enumerate(self.events) if event["event"] == "start"]
        steps = [event for event in self.events[starts[-1] if starts else 0 :] if event["event"] == "step"]
        values = [(find_number(event, "step"), find_number(event, "spent")) for event in steps]
        known = [(step, spent) for step, spent in values if step is not None and spent is not None]
        steps_done, spent = (known[-1][part] - known[0][part] for part in (0, 1)) if known else (0.0, 0.0)
        return spent / steps_done if steps_done > 0 and spent > 0 else None

    def failure(self, since: float) -> str | None:
        """Why the latest start failed: the watchdog's summary, or the first crash report since then."""
        start = self.last("start") or (self.events[0] if self.events else {"time": 0.0})
        try:
            hang = self.folder.path / "hangs" / "summary.txt"
            if hang.exists() and hang.stat().st_mtime >= max(since, self.last_recorded or 0.0):
                return _first_line(hang.read_text(encoding="utf-8", errors="replace"))
            report = first_crash_report(self.folder.path, max(since, float(start["time"])))
        except (OSError, TypeError):
            return None
        return None if report is None else _first_line(report)


def read_job_lines(path: Path) -> list[Record]:
    """The valid lines about jobs in a run directory: submissions and attempts, oldest first."""
    found: list[Record] = []
    for name, kind in (("jobs.jsonl", "job"), ("turns.jsonl", "turn")):
        with suppress(OSError):
            lines = parse_records((path / "slurm" / name).read_text(encoding="utf-8", errors="replace"))
            found += [line for line in lines if _is_valid(line, kind) and isinstance(line.get("job"), str)]
    return sorted(found, key=lambda line: line["time"])


def derive_status(
    name: str, history: RunHistory, queue: Mapping[str, QueuedJob] | None, now: float
) -> RunStatus:
    """The status of a run, under the name to print.

    queue: SLURM's jobs by number; None where SLURM was not asked or did not answer. now: seconds since 1970.
    """
    jobs = dict.fromkeys(line["job"] for line in history.lines)
    found = [queue[job] for job in jobs if job in queue] if queue else []
    # Of the jobs of a chain, the one that runs.
    queued = next((job for job in found if job.state in _ALIVE), found[0] if found else None)
    state, reason = _state(history, queue, queued, now)
    step, total, left = history.latest("step"), history.latest("total_steps"), None
    if state != "finished" and history.pace is not None and step is not None and total is not None:
        left = round(max(0.0, (total - step) * history.pace), 1)
    last_step, recorded = history.last("step"), history.last_recorded
    job = history.latest_job if queued is None else queued.id
    return RunStatus(
        name=name, folder=str(history.folder.path), state=state,
        reason="; ".join(filter(None, (reason, history.problem))),
        step=None if step is None else int(step), total_steps=None if total is None else int(total),
        seconds_left=left, restarts=_restarts(history),
        loss=find_number(last_step, "loss", most=math.inf),
        diverged="loss" in last_step and last_step["loss"] is None,
        top1=_top1(history), job=job, nodes=_nodes(history, job) if queued is None else queued.nodes,
        silent=None if recorded is None else round(max(0.0, now - recorded), 1),
    )  # fmt: skip


def _state(
    history: RunHistory, queue: Mapping[str, QueuedJob] | None, queued: QueuedJob | None, now: float
) -> tuple[State, str]:
    attempt, job = history.attempt, history.latest_job
    is_over = attempt is None or attempt["turn"] == "ended" or attempt["time"] <= history.event["time"]
    if history.last("start", "end").get("event") == "end" and is_over:
        return "finished", ""
    if queued is not None:
        return _state_in_queue(history, queued)
    if job is not None and (attempt is None or attempt["job"] != job):
        if queue is not None:
            return "unknown", "its job left the queue before it began: cancelled, or its script failed"
        return "waiting", "submitted; SLURM was not asked"
    if attempt is not None and attempt["turn"] == "ended":
        return _state_after(attempt, is_gone=queue is not None)
    if attempt is not None and queue is not None:
        reason = f"job {job} left the queue without a result: it was killed, or its node was lost"
        return "failed", history.failure(0.0) or reason
    return _state_of_files(history, now)


def _state_in_queue(history: RunHistory, queued: QueuedJob) -> tuple[State, str]:
    attempt = history.attempt
    if queued.state == "RUNNING":
        event = history.event
        if attempt is None or attempt["job"] != queued.id or event["time"] < attempt["time"]:
            return "running", "starting"
        return "running", f"stopping: {event.get('reason')}" if event["event"] == "left" else ""
    if queued.state in _ALIVE:
        return "running", f"SLURM's state is {queued.state}"
    if attempt is None or attempt["job"] != queued.id:
        return "waiting", queued.why
    reason = "its last attempt ended without a result, as when a node is lost"
    if attempt["turn"] == "ended":
        reason = _first_line(str(attempt.get("words", "")))
    return "requeued", f"{reason}; {queued.why}"


def _state_after(attempt: Record, *, is_gone: bool) -> tuple[State, str]:
    """After an attempt's end. is_gone: whether SLURM was asked and has no further job of the run."""
    reason = _first_line(str(attempt.get("words", "")))
    match attempt.get("verdict"):
        case "done":
            return "finished", ""
        case "stopped" | "given up" as state:
            return state, reason
        case "requeued":
            return ("unknown", f"{reason}; the queue has no such job") if is_gone else ("requeued", reason)
        case "left to the next job":
            return ("stopped", f"{reason}; the queue has no next job") if is_gone else ("waiting", reason)
    return "unknown", reason


def _state_of_files(history: RunHistory, now: float) -> tuple[State, str]:
    """Of a run without a job, or with a job of which SLURM was not asked."""
    began, alive = read_holder_times(history.folder.path) or (0.0, 0.0)
    event = history.event if history.event["time"] >= began else {"event": "start"}
    if event["event"] == "left":
        return "stopped", f"by {event.get('reason')}"
    if event["event"] == "failed":
        return "failed", _first_line(str(event.get("words", "")))
    if (failure := history.failure(began)) is not None:
        return "failed", failure
    alive = max(alive, history.last_recorded or 0.0)
    if now - alive <= STALE:
        if is_holder_dead_here(history.folder.path):
            return "failed", "its process ended and recorded no reason"
        return "running", "starting" if event["event"] == "start" else ""
    silence = f"no heartbeat for {format_age(now - alive)}" if alive else "no event yet"
    return "unknown", "" if history.problem else silence


def _restarts(history: RunHistory) -> int:
    """The larger of two counts, the run's own and that of its jobs: each misses starts of the other."""
    kinds = [event["event"] for event in history.events]
    after = kinds[len(kinds) - kinds[::-1].index("step") :] if "step" in kinds else []
    own = int(find_number(history.last("step"), "starts") or 1) + after.count("start")
    return max(own, kinds.count("start"), sum(line["turn"] == "begun" for line in history.attempts)) - 1


def _top1(history: RunHistory) -> float | None:
    """Of the last evaluation, which may be older than the latest events."""
    if evaluation := history.last("evaluation"):
        return find_number(evaluation, "top1")
    known = read_accuracies(history.folder.checkpoints)
    return known[max(known)] if known else None


def _nodes(history: RunHistory, job: str | None) -> str:
    if job is not None:
        return next((str(line["nodes"]) for line in reversed(history.attempts) if line.get("nodes")), "")
    return str(read_json(history.folder.environment).get("hostname", ""))


def _is_valid(line: Record, kind: str) -> bool:
    return isinstance(line.get(kind), str) and find_number(line, "time") is not None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]

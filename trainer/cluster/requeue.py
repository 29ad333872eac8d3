"""The turns of a job: each start of it that SLURM gives a run, what it came to, and whether there is another.

The script of a job asks at the beginning and at the end of each turn. Both are written into
`slurm/turns.jsonl` of the run's folder; a turn whose node died has no end there. Progress is what the next
turn can go on from: the step of the newest checkpoint.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.retention import Retention, step_of
from trainer.cluster.first_failure import first_failure, last_message
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.signals import INTERRUPTED, REQUEUE
from trainer.system.files import append_lines, parse_records

MAX_FRUITLESS = 3
"""Turns of a job in a row without a step of progress after which it is not queued again."""

PREFLIGHT_FAILED = 3
"""What a job's script says where the preflight found a node that is not fit, and nothing was trained."""

ENDED = 1
"""What a job ends with that is not queued again although its training asked for it."""

USER_ERROR = 2
"""What the training says when its user must mend something."""

Outcome = Literal["done", "requeued", "left to the next job", "stopped", "given up"]


@dataclass(frozen=True)
class Attempt:
    """Which start of which job this is.

    job: SLURM's number; of a task of an array `12_3`. restart: how often it was queued again before. nodes: a
    node list such as `n[1-2]`. chained: whether another job goes on where this one ends, which is not queued
    again then. submitted: when the job was, seconds since 1970; 0 where it is not known.
    """

    job: str
    restart: int
    nodes: str
    chained: bool = False
    submitted: float = 0.0


@dataclass(frozen=True)
class AttemptEnd:
    """verdict: what becomes of the job. words: why, for whoever reads its log. code: its exit code; REQUEUE
    asks the script to have it queued again.
    """

    verdict: Outcome
    words: str
    code: int


class Attempts:
    """The turns of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = RunDir(run_dir)
        self._path = run_dir / "slurm" / "turns.jsonl"

    def begin(self, job: Attempt) -> Path | None:
        """Note that a turn begins; returns the folder for the logs of its ranks, None where nothing is left
        to do for a job of a chain.

        Raises RunError when the last turns came to nothing: the job ends here, and says why.
        """
        if job.chained and (self.is_finished() or self._was_stopped(job)):
            return None
        step = self._step()
        fruitless = self._fruitless(job, step)
        if len(fruitless) >= MAX_FRUITLESS:
            words = _given_up(job, step, fruitless)
            self._append("ended", job, step=step, code=USER_ERROR, verdict="given up", words=words)
            raise RunError(words)
        logs = self._folder.path.absolute() / "logs" / f"job-{job.job}.{job.restart}"
        logs.mkdir(parents=True, exist_ok=True)
        self._append("begun", job, step=step, nodes=job.nodes, logs=str(logs))
        return logs

    def end(self, job: Attempt, *, code: int, state: str) -> AttemptEnd:
        """Note what a turn came to, and say what becomes of the job.

        Args:
            job: as at the turn's beginning.
            code: what the training left with, as srun tells it.
            state: SLURM's word for the job at this moment; UNKNOWN where it does not answer.
        """
        step = self._step()
        end = self._judge(job, step, code, state)
        self._append("ended", job, step=step, code=code, state=state, verdict=end.verdict, words=end.words)
        return end

    def is_finished(self) -> bool:
        """Whether the run came to its end: there is nothing left to do for another job."""
        last = self._folder.find_last_event("start", "end")
        return last is not None and last["event"] == "end"

    def _judge(self, job: Attempt, step: int, code: int, state: str) -> AttemptEnd:
        if code == 0:
            return AttemptEnd("done", "the run is done", 0)
        if state not in ("RUNNING", "UNKNOWN"):
            # Queued again here, an scancel would be undone; a preempted job, or one that lost a node, SLURM
            # queues again itself.
            words = "SLURM ends the job (cancelled, preempted, a node lost or its time over)"
            return AttemptEnd("stopped", f"{words}, {_saved(step)}", ENDED)
        if code == INTERRUPTED:
            words = f"a person asked the run to stop, {_saved(step)}. Submit it again to go on"
            return AttemptEnd("stopped", words, code)
        if code == USER_ERROR:
            return AttemptEnd("given up", f"something must be mended first: {self._mistake(job)}", code)
        if code == PREFLIGHT_FAILED:
            what, everywhere = self._unfit()
            if everywhere:
                return AttemptEnd("given up", f"no node is fit, {_saved(step)}: {what}", code)
            what = f"the nodes are not fit, {_saved(step)}: {what}"
        elif code == REQUEUE:
            what = f"asked to leave, {_saved(step)}"
        else:
            what = f"failed with {code}, {_saved(step)}; {self._failure(job)}"
        fruitless = self._fruitless(job, step)
        if len(fruitless) >= MAX_FRUITLESS:
            words = _given_up(job, step, fruitless)
            return AttemptEnd("given up", f"{words}; {what}", ENDED if code == REQUEUE else code)
        if job.chained:
            return AttemptEnd("left to the next job", what, 0 if code == REQUEUE else code)
        return AttemptEnd("requeued", what, REQUEUE)

    def _failure(self, job: Attempt) -> str:
        """What failed first in this turn."""
        begun = self._this(job)
        return first_failure(self._folder.path, Path(begun["logs"]), since=begun["time"])

    def _mistake(self, job: Attempt) -> str:
        """What the ranks say together that is to be mended: rank 0 says it for all."""
        return last_message(Path(self._this(job)["logs"]), 0, "error: ") or self._failure(job)

    def _unfit(self) -> tuple[str, bool]:
        """What the preflight wrote down of the nodes, and whether it is so on every node."""
        path = self._path.with_name("preflight.json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return "the preflight did not come to its end; its log is above", False
        if not found["failed"]:
            return "; ".join(found["everywhere"]), True
        words = "; ".join(f"{node}: {', '.join(problems)}" for node, problems in found["failed"].items())
        without = f"--sbatch=--exclude={','.join(found['failed'])}"
        return f"{words}. To do without them, cancel the job and submit again with {without}", False

    def _was_stopped(self, job: Attempt) -> bool:
        """Whether someone stopped the run, or it was given up, since this job of a chain was submitted."""
        ends = [turn for turn in self._turns("ended") if turn["time"] >= job.submitted]
        return bool(ends) and (ends[-1]["code"] == INTERRUPTED or ends[-1]["verdict"] == "given up")

    def _fruitless(self, job: Attempt, step: int) -> list[dict[str, Any]]:
        """The latest turns of a job, or of its chain, that all began at this very step and came to nothing.

        One that SLURM ended did not fail.
        """
        ended = {
            (turn["job"], turn["restart"]) for turn in self._turns("ended") if turn["verdict"] == "stopped"
        }
        found: list[dict[str, Any]] = []
        for turn in reversed(self._turns("begun")):
            if turn["job"] != job.job and not (job.chained and turn["time"] >= job.submitted):
                continue
            if turn["step"] != step:
                break
            if (turn["job"], turn["restart"]) not in ended:
                found.insert(0, turn)
        return found

    def _this(self, job: Attempt) -> dict[str, Any]:
        """How this turn began."""
        return next(
            turn
            for turn in reversed(self._turns("begun"))
            if (turn["job"], turn["restart"]) == (job.job, job.restart)
        )

    def _turns(self, kind: str) -> list[dict[str, Any]]:
        """Beginnings, or ends, of the run's turns, oldest first."""
        if not self._path.exists():
            return []
        lines = parse_records(self._path.read_text(encoding="utf-8"))
        return [turn for turn in lines if turn["turn"] == kind]

    def _step(self) -> int:
        """Of the newest checkpoint; -1 where there is none."""
        visible = Retention(self._folder.checkpoints, keep_last=1, keep_best=False).visible()
        return step_of(visible[-1]) if visible else -1

    def _append(self, turn: str, job: Attempt, **values: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        about = {"turn": turn, "job": job.job, "restart": job.restart, "time": round(time.time(), 3)}
        append_lines(self._path, [{**about, **values}])


def _saved(step: int) -> str:
    return "nothing is saved yet" if step < 0 else f"step {step} is saved"


def _given_up(job: Attempt, step: int, fruitless: list[dict[str, Any]]) -> str:
    logs = ", ".join(turn["logs"] for turn in fruitless)
    where = "no step was saved" if step < 0 else f"step {step} stayed the last one saved"
    return (
        f"job {job.job} had {len(fruitless)} turns in a row without a step of progress ({where}): it is not "
        f"queued again. Their logs: {logs}. Mend what they show, then submit the run again"
    )

"""The attempts of a job: each start that SLURM gives a run, its result, and whether the job is requeued.

The script of a job calls `launch/slurm/turn.py` before and after each attempt. Each call appends a line to
`slurm/turns.jsonl` in the run directory; an attempt whose node died has no second line. An attempt makes
progress if it saves a newer checkpoint.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.retention import Retention, step_of
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.crash_report import first_crash_report
from trainer.resilience.signals import INTERRUPTED, REQUEUE
from trainer.system.files import append_lines, parse_records, read_json

MAX_FRUITLESS = 3  # attempts of a job in a row without progress after which it is not requeued

NOT_REQUEUED = 1  # exit code of a job that is not requeued although its training asked for it
USER_ERROR = 2  # exit code of a training that fails again unless its user corrects something
PREFLIGHT_FAILED = 3  # exit code that a job's script passes where the preflight failed

_TAIL = 4096  # bytes at the end of a rank's log that are read
_LINES = 6  # of these, printed

# srun: error: n2: task 1: Killed      srun: error: n[1-2]: tasks 0-1: Exited with exit code 1
_SRUN = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<what>.*)")

Outcome = Literal["done", "requeued", "left to the next job", "stopped", "given up"]


@dataclass(frozen=True)
class Attempt:
    """Which start of which job this is."""

    job: str
    """SLURM's number; `12_3` for a task of an array"""
    restart: int
    """how often the job was requeued before"""
    nodes: str
    chained: bool = False
    """whether another job goes on where this one ends; this one is then not requeued"""
    submitted: float = 0.0
    """when the job was submitted, seconds since 1970; 0 where unknown"""


@dataclass(frozen=True)
class AttemptEnd:
    """The result of an attempt. code: the job's exit code; REQUEUE asks the script to requeue the job."""

    outcome: Outcome
    reason: str
    code: int


class Attempts:
    """The attempts of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = RunDir(run_dir)
        self._path = run_dir / "slurm" / "turns.jsonl"

    def begin(self, attempt: Attempt) -> Path | None:
        """Record that an attempt begins; returns the folder for the logs of its ranks.

        Returns None where a job of a chain has nothing left to do. Raises RunError, and records the end of
        the job, when the last attempts made no progress.
        """
        if attempt.chained and (self.is_finished() or self._was_stopped(attempt)):
            return None
        step = self._step()
        fruitless = self._fruitless(attempt, step)
        if len(fruitless) >= MAX_FRUITLESS:
            reason = _no_progress(attempt, step, fruitless)
            self._append("ended", attempt, step=step, code=USER_ERROR, verdict="given up", words=reason)
            raise RunError(reason)
        logs = self._folder.path.absolute() / "logs" / f"job-{attempt.job}.{attempt.restart}"
        logs.mkdir(parents=True, exist_ok=True)
        self._append("begun", attempt, step=step, nodes=attempt.nodes, logs=str(logs))
        return logs

    def end(self, attempt: Attempt, *, code: int, state: str) -> AttemptEnd:
        """Decide what the job does next, and record it.

        code: exit code of the training, as srun returns it. state: SLURM's state of the job at this moment,
        UNKNOWN where SLURM does not answer.
        """
        step = self._step()
        end = self._decide(attempt, step, code, state)
        result = {"step": step, "code": code, "state": state, "verdict": end.outcome, "words": end.reason}
        self._append("ended", attempt, **result)
        return end

    def is_finished(self) -> bool:
        """Whether the run is complete, so that another job has nothing to do."""
        last = self._folder.find_last_event("start", "end")
        return last is not None and last["event"] == "end"

    def _decide(self, attempt: Attempt, step: int, code: int, state: str) -> AttemptEnd:
        saved = "nothing is saved yet" if step < 0 else f"step {step} is saved"
        if code == 0:
            return AttemptEnd("done", "the run is done", 0)
        if state not in ("RUNNING", "UNKNOWN"):
            # A requeue would undo an scancel. SLURM itself requeues after preemption or a lost node.
            reason = f"SLURM ended the job (cancelled, preempted, a node lost or its time over), {saved}"
            return AttemptEnd("stopped", reason, NOT_REQUEUED)
        if code == INTERRUPTED:
            return AttemptEnd("stopped", f"a person stopped the run, {saved}. Submit again to continue", code)
        if code == USER_ERROR:
            # Rank 0 prints the error that all ranks agreed on.
            message = _last_error(Path(self._begun(attempt)["logs"]))
            return AttemptEnd("given up", f"correct this first: {message or self._failure(attempt)}", code)
        if code == PREFLIGHT_FAILED:
            reason, everywhere = self._preflight_failures()
            if everywhere:
                return AttemptEnd("given up", f"the preflight failed on all nodes, {saved}: {reason}", code)
            reason = f"the preflight failed, {saved}: {reason}"
        elif code == REQUEUE:
            reason = f"asked to leave, {saved}"
        else:
            reason = f"failed with exit code {code}, {saved}; {self._failure(attempt)}"
        fruitless = self._fruitless(attempt, step)
        if len(fruitless) >= MAX_FRUITLESS:
            reason = f"{_no_progress(attempt, step, fruitless)}; {reason}"
            return AttemptEnd("given up", reason, NOT_REQUEUED if code == REQUEUE else code)
        if attempt.chained:
            return AttemptEnd("left to the next job", reason, 0 if code == REQUEUE else code)
        return AttemptEnd("requeued", reason, REQUEUE)

    def _failure(self, attempt: Attempt) -> str:
        begun = self._begun(attempt)
        return first_failure(self._folder.path, Path(begun["logs"]), since=begun["time"])

    def _preflight_failures(self) -> tuple[str, bool]:
        """What failed on which nodes, and whether it failed on all of them."""
        found = read_json(self._path.with_name("preflight.json"))
        if not found:
            return "it wrote no result; its log is above", False
        if not found["failed"]:
            return "; ".join(found["everywhere"]), True
        failures = "; ".join(f"{node}: {', '.join(texts)}" for node, texts in found["failed"].items())
        without = f"--sbatch=--exclude={','.join(found['failed'])}"
        return f"{failures}. To exclude these nodes, cancel the job and submit again with {without}", False

    def _was_stopped(self, attempt: Attempt) -> bool:
        """Whether a person stopped the run, or it was given up, since this job of a chain was submitted."""
        ends = [line for line in self._lines("ended") if line["time"] >= attempt.submitted]
        return bool(ends) and (ends[-1]["code"] == INTERRUPTED or ends[-1]["verdict"] == "given up")

    def _fruitless(self, attempt: Attempt, step: int) -> list[dict[str, Any]]:
        """The latest attempts of a job, or of its chain, that began at this step, so made no progress.

        An attempt that SLURM ended did not fail, and is left out.
        """
        stopped = {
            (end["job"], end["restart"]) for end in self._lines("ended") if end["verdict"] == "stopped"
        }
        found: list[dict[str, Any]] = []
        for begun in reversed(self._lines("begun")):
            if begun["job"] != attempt.job and not (attempt.chained and begun["time"] >= attempt.submitted):
                continue
            if begun["step"] != step:
                break
            if (begun["job"], begun["restart"]) not in stopped:
                found.insert(0, begun)
        return found

    def _begun(self, attempt: Attempt) -> dict[str, Any]:
        """The line that `begin` wrote."""
        lines = [line for line in self._lines("begun") if line["job"] == attempt.job]
        return next(line for line in reversed(lines) if line["restart"] == attempt.restart)

    def _lines(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, `begun` or `ended`, oldest first."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        return [line for line in parse_records(text) if line["turn"] == kind]

    def _step(self) -> int:
        """The step of the newest checkpoint; -1 where there is none."""
        visible = Retention(self._folder.checkpoints).visible()
        return step_of(visible[-1]) if visible else -1

    def _append(self, kind: str, attempt: Attempt, **values: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        about = {"turn": kind, "job": attempt.job, "restart": attempt.restart, "time": round(time.time(), 3)}
        append_lines(self._path, [{**about, **values}])


def _no_progress(attempt: Attempt, step: int, fruitless: list[dict[str, Any]]) -> str:
    logs = ", ".join(begun["logs"] for begun in fruitless)
    newest = "no checkpoint was saved" if step < 0 else f"the newest checkpoint is still step {step}"
    return (
        f"job {attempt.job} made no progress in {len(fruitless)} attempts in a row ({newest}): it is not "
        f"requeued. See their logs: {logs}. Correct the cause, then submit the run again"
    )


def first_failure(run_dir: Path, logs: Path, since: float) -> str:
    """The first failure of an attempt, with the traceback or the end of the rank's log.

    logs: folder of the ranks' logs, and of srun's messages. since: start of the attempt, seconds since 1970.
    """
    srun = logs / "srun.log"
    text = srun.read_text(encoding="utf-8", errors="replace") if srun.exists() else ""
    match, ended = _SRUN.search(text), None
    if match is not None:
        ranks = re.split("[,-]", match["ranks"])
        several = "s" if len(ranks) > 1 else ""
        ended = f"rank{several} {match['ranks']} on {match['node']} ended first: {match['what']}"
        ended = "\n".join(filter(None, (ended, _end_of_log(logs, int(ranks[0])))))
        # A killed rank writes no crash report; the other ranks report that it is gone.
        if not match["what"].startswith("Exited"):
            return ended
    report = first_crash_report(run_dir, since) or ended
    return report or _end_of_log(logs, 0) or f"no rank wrote anything; see {logs}"


def _last_error(logs: Path) -> str | None:
    """The last error that rank 0 printed, to the end of its log."""
    lines, prefix = _tail(logs / "rank-0.log"), "error: "
    starts = [number for number, line in enumerate(lines) if line.startswith(prefix)]
    return "\n".join(lines[starts[-1] :]).removeprefix(prefix).strip() if starts else None


def _end_of_log(logs: Path, rank: int) -> str | None:
    path = logs / f"rank-{rank}.log"
    lines = [line for line in _tail(path) if line.strip()][-_LINES:]
    return f"the end of {path}:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


def _tail(path: Path) -> list[str]:
    """The last lines of a log; none where it does not exist."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        return file.read().decode(errors="replace").splitlines()

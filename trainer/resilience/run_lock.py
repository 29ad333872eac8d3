"""A lock on a run directory that works on NFS and after SIGKILL.

Each attempt that acquires the directory creates `lock/NUMBER.json` with the next number; the highest number
names the holder. When that holder is gone, an attempt creates the next file as a hard link to a complete
file: of several attempts, one succeeds. The lock uses no file-system locks, and no attempt replaces another's
file: an attempt that acts on old information fails to create its file, or finds a higher number.

The holder touches its file every few seconds (the heartbeat). The file system's clock, on NFS the server's,
sets the time; its age is relative to a file that the reader has just touched.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.errors import RunError
from trainer.resilience.lock_record import HolderState, LockRecord, read_lock
from trainer.resilience.process_identity import boot_id
from trainer.system.files import write_text

BEAT = 10.0  # seconds between heartbeats
STALE = 180.0  # seconds without a heartbeat after which a holder of unknown state is considered gone
_POLL_EVERY = 1.0  # seconds between checks of a holder that may be gone

_NAME = re.compile(r"(\d{6,18})\.json")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}

_log = logging.getLogger(__name__)


@dataclass
class RunLock:
    """The lock of a run directory; `acquire` returns it when it is held. Fields: arguments of `acquire`."""

    run_dir: Path
    stale: float
    beat: float
    waiting: Callable[[str], None]
    on_loss: Callable[[str], None]
    option: str

    def __post_init__(self) -> None:
        """Wait for the holder, take the lock, and start the heartbeat. Raises as `acquire`, and OSError."""
        self._folder = _folder(self.run_dir)
        self._token = secrets.token_hex(8)
        self._temporary = self._folder / f".{self._token}"
        descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._record = LockRecord.own(self._token, flock=_flock(descriptor))
            os.write(descriptor, self._record.text().encode())
            os.fsync(descriptor)
            self._number, self._descriptor = self._take_number(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            self._temporary.unlink(missing_ok=True)
        self._tidy(self._number)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run lock")
        self._thread.start()

    def release(self) -> None:
        """Release the directory. Removes what was created for a run that did not begin."""
        self._ended.set()
        self._thread.join(BEAT)
        file = _file(self._folder, self._number)
        with suppress(OSError):  # the next attempt finds this process gone
            if not (self.run_dir / "recipe.yaml").exists() and self._number == 1:
                file.unlink(missing_ok=True)
                self._folder.rmdir()
                self.run_dir.rmdir()  # only if empty
            else:
                write_text(file, replace(self._record, released=True).text(), sync=False)
        with suppress(OSError):
            os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(self.beat):
            with suppress(OSError):  # a full disk, an unreachable server
                # Without times, the file system uses its own clock.
                os.utime(self._descriptor)
                if max(_numbers(self._folder), default=0) > self._number:
                    self.on_loss(
                        f"{_describe(_latest(self._folder)[1])} has acquired the run folder {self.run_dir}, "
                        f"because this process had no heartbeat for {STALE:g} s: it ends here, so that two "
                        "runs do not mix"
                    )
                    return

    def _take_number(self, descriptor: int) -> tuple[int, int]:
        """Create the next file once the holder is gone; returns its number and descriptor."""
        while True:
            number = self._wait_until_gone() + 1
            made = self._make(number, descriptor)
            if made is None:
                continue  # another start was faster
            # An attempt that was suspended may have created a number that others have used and removed.
            if max(_numbers(self._folder), default=0) == number:
                return number, made
            _file(self._folder, number).unlink(missing_ok=True)

    def _make(self, number: int, descriptor: int) -> int | None:
        """Create the file of this number; returns its descriptor, None if the file exists."""
        file = _file(self._folder, number)
        before = os.fstat(descriptor).st_nlink
        try:
            os.link(self._temporary, file)
        except OSError as error:
            # NFS may have created the link and lost the reply; the retry then fails.
            if os.fstat(descriptor).st_nlink > before:
                return descriptor
            if isinstance(error, FileExistsError):
                return None
            if error.errno not in _NO_LINKS:
                raise
        else:
            return descriptor
        return self._create(file, descriptor)

    def _create(self, file: Path, descriptor: int) -> int | None:
        """The same on a file system without hard links: the file exists before its content."""
        try:
            created = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        record = LockRecord.own(self._token, flock=_flock(created))
        os.write(created, record.text().encode())
        os.fsync(created)
        os.close(descriptor)
        return created

    def _wait_until_gone(self) -> int:
        """Wait until the latest holder is gone; returns its number. Raises RunError if it is running."""
        watched: tuple[int, float] | None = None  # number and time of the latest file
        begun = 0.0
        while True:
            number, holder, touched = _latest(self._folder)
            if number == 0:
                return 0
            file = _file(self._folder, number)
            state = HolderState.UNKNOWN if holder is None else holder.state(file)
            if state is HolderState.GONE:
                return number
            age = self._now() - touched
            beats = watched is not None and watched != (number, touched)
            if state is HolderState.ALIVE or beats:
                self._refuse(file, holder, age)
            if age > self.stale or (watched and time.monotonic() - begun > self.stale):
                words = f"{_describe(holder)} had no heartbeat for {age:.0f} s"
                _log.warning("%s: acquiring its run folder %s", words, self.run_dir)
                return number
            if watched is None:
                watched, begun = (number, touched), time.monotonic()
                self.waiting(
                    f"the folder {self.run_dir} was last used by {_describe(holder)}, which may still "
                    f"be running: waiting for a heartbeat, up to {max(0.0, self.stale - age):.0f} s"
                )
            time.sleep(min(_POLL_EVERY, self.stale / 4))

    def _refuse(self, file: Path, holder: LockRecord | None, age: float) -> None:
        if holder is None:
            who, end = f"an unknown process ({file} cannot be read)", "end it"
        else:
            who, end = holder.description, f"end it ({holder.advice})"
        raise RunError(
            f"the folder {self.run_dir} is in use by {who}; last heartbeat {max(0.0, age):.0f} s "
            f"ago. Wait for that run or {end}, and start again; or name another folder with {self.option}"
        )

    def _now(self) -> float:
        """The file system's present time."""
        os.utime(self._temporary)
        with open(self._temporary, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime

    def _tidy(self, number: int) -> None:
        """Remove the files of earlier attempts, and partial files of killed ones."""
        with suppress(OSError):
            for other in _numbers(self._folder):
                if other < number:
                    _file(self._folder, other).unlink(missing_ok=True)
            now = _file(self._folder, number).stat().st_mtime
            for path in self._folder.glob(".*"):
                with suppress(OSError):
                    if now - path.stat().st_mtime > 10 * self.stale:
                        path.unlink()


def acquire(
    run_dir: Path,
    *,
    stale: float = STALE,
    beat: float = BEAT,
    waiting: Callable[[str], None] = _log.warning,
    on_loss: Callable[[str], None] | None = None,
    option: str = "--run-dir",
) -> RunLock:
    """Acquire a run directory, which is created if missing.

    If this machine or SLURM shows that the holder is gone, the directory is acquired at once. Otherwise this
    waits for a heartbeat, up to `stale` seconds.

    Args:
        run_dir: the run directory.
        stale: seconds without a heartbeat after which a holder is considered gone.
        beat: seconds between heartbeats of this process.
        waiting: called with a line if this waits.
        on_loss: called with a line if another attempt acquired the directory, because this process seemed
            to be gone. By default the process ends.
        option: the command-line option for another folder.

    Raises:
        RunError: another run holds the directory, or the lock cannot be written.
    """
    folder = _folder(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RunLock(run_dir, stale, beat, waiting, on_loss or _end, option)
    except OSError as error:
        raise RunError(
            f"cannot write the lock of the folder {run_dir} ({folder}): {error.strerror or error}; mend "
            f"that, or choose another folder with {option}"
        ) from error


def is_holder_dead_here(run_dir: Path) -> bool:
    """Whether the holder was a process of this machine and is gone. Asks no SLURM."""
    with suppress(OSError):
        number, record, _ = _latest(_folder(run_dir))
        if record is not None and not record.released and record.boot == boot_id():
            return record.state(_file(_folder(run_dir), number)) is HolderState.GONE
    return False


def read_holder_times(run_dir: Path) -> tuple[float, float] | None:
    """Start and last heartbeat of the holder, in seconds since 1970; None without a holder."""
    with suppress(OSError):
        _, record, touched = _latest(_folder(run_dir))
        if record is not None and not record.released:
            return record.since, touched
    return None


def _describe(holder: LockRecord | None) -> str:
    return "an unknown process" if holder is None else holder.description


def _folder(run_dir: Path) -> Path:
    return run_dir / "lock"


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _numbers(folder: Path) -> list[int]:
    return [int(match[1]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]


def _latest(folder: Path) -> tuple[int, LockRecord | None, float]:
    """Number, record and time of the latest file; number 0 without one."""
    while number := max(_numbers(folder), default=0):
        with suppress(FileNotFoundError):  # a later attempt has just removed it
            return number, *read_lock(_file(folder, number))
    return 0, None, 0.0


def _flock(descriptor: int) -> bool:
    """Lock the file, for checks from other containers on this machine; False if not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _end(words: str) -> None:
    """End the process at once: another run holds the directory."""
    with suppress(OSError):
        print(f"error: {words}", file=sys.stderr, flush=True)
    os._exit(2)

"""An SQLite database for MLflow: made whole or not at all, whoever makes it and however that is interrupted.

MLflow makes its tables in some seconds, step by step. A process that dies meanwhile, or a second one that
does the same, leaves tables that MLflow can neither use nor complete. So they are made in a file beside,
which then gets its name.
"""

import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from glob import escape
from pathlib import Path

from trainer.tracking.address import sqlite_address

LOCK_PATIENCE = 120.0  # seconds that another process may take to make the database
SETTLED = 10.0  # seconds without a change after which nobody is still making a database's tables

_DATA = ("experiments", "runs", "registered_models", "trace_info", "datasets")
"""Tables that have rows in a database that was used."""

_log = logging.getLogger(__name__)


class DatabaseBusy(Exception):
    """Another process is at work on the database; to be tried again."""


def ensure_database(path: Path) -> bool:
    """Make the database where there is none, or only a part of one; returns whether it is new.

    A part is what an interrupted first creation left, without any data in it: it is set aside under another
    name. Raises DatabaseBusy while another process makes the database, OSError or sqlite3.Error where the
    file or its folder cannot be used.
    """
    if not is_partial(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not is_partial(path):  # another process made it meanwhile
            return False
        if path.exists():
            _set_aside(path)
        _make(path)
        return True


def is_partial(path: Path) -> bool:
    """Whether a database is missing, is empty, or has tables of MLflow but not all, and no data.

    The last that MLflow does for a new database is to add the experiment "Default": a database with an
    experiment is whole, also where another version of MLflow made it.
    """
    if not path.exists() or path.stat().st_size == 0:
        return True
    try:
        # Not read-only: a journal that a killed process left is rolled back first. But never creating a file.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=5)
    except sqlite3.OperationalError:
        if path.exists():
            raise
        return True  # another process has set it aside meanwhile
    with closing(connection) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return True
        if "experiments" not in tables and "alembic_version" not in tables:
            return False  # somebody else's database: MLflow adds its tables
        if any(_has_rows(database, table) for table in _DATA if table in tables):
            return False
        version = None
        if "alembic_version" in tables:
            version = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return version is None or version[0] != _newest_version()


def _has_rows(database: sqlite3.Connection, table: str) -> bool:
    return database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None


def _newest_version() -> str | None:
    """The version of the tables that the installed MLflow makes."""
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations"
    return ScriptDirectory(str(migrations)).get_current_head()


def _set_aside(path: Path) -> None:
    age = time.time() - path.stat().st_mtime
    if path.stat().st_size and 0 <= age < SETTLED:
        raise DatabaseBusy(f"{path} is being made by another process, or its making was just interrupted")
    aside = path.with_name(f"{path.name}.incomplete-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    for suffix in ("-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    os.replace(path, aside)
    _log.warning(
        "%s was left incomplete by an interrupted start and holds no run: it is now %s, and is made anew",
        path,
        aside.name,
    )


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in path.parent.glob(f".{escape(path.name)}.*.partial*"):
        with suppress(OSError):  # of a process that was killed: this one holds the lock
            left.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        store = SqlAlchemyStore(sqlite_address(partial), (path.parent / "mlartifacts").as_uri())
        store.engine.dispose()
        _flush(partial)
        try:
            os.link(partial, path)  # fails where there is one by now; a rename would replace it
        except FileExistsError:
            raise DatabaseBusy(f"{path} was made by another process meanwhile") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            os.rename(partial, path)  # a file system without hard links
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                os.unlink(f"{partial}{suffix}")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a database that is to be made: a file beside it, removed afterwards.

    A file system without locks lets everybody make one: the first to be named stays.
    """
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DatabaseBusy(
                        f"{path} is being made by another process, which holds {lock}"
                    ) from None
                time.sleep(0.1)
                continue
            except OSError:
                pass
            if not _is_same(file.fileno(), lock):
                continue  # its former holder removed it: another process may hold the lock of a newer one
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
            return


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    return False

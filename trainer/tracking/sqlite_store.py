"""Creates an SQLite database for MLflow atomically.

MLflow creates its tables one by one, which takes seconds. A process that dies in between, or a second process
that does the same, leaves tables that MLflow can neither use nor complete. So the tables are created in a
temporary file, which is then renamed.
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

from pipelines.atomic_file import flush
from trainer.tracking.address import sqlite_address

LOCK_TIMEOUT = 120.0  # seconds that another process may take to create the database
IDLE_SECONDS = 10.0  # without a change for so long, no process is creating tables in the database

_DATA = ("experiments", "runs", "registered_models", "trace_info", "datasets")
"""Tables that have rows once a database was used."""

_log = logging.getLogger(__name__)


class DatabaseBusy(Exception):
    """Another process is creating the database; the upload tries again later."""


def ensure_database(path: Path) -> bool:
    """Create the database if it is missing or incomplete; returns whether it is new.

    An incomplete database, left by an interrupted creation and without data, is renamed. Raises DatabaseBusy
    while another process creates the database, OSError or sqlite3.Error if the file or its folder cannot be
    used.
    """
    if not is_partial(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not is_partial(path):  # another process created it
            return False
        if path.exists():
            _rename_incomplete(path)
        _create(path)
        return True


def is_partial(path: Path) -> bool:
    """Whether a database is missing, is empty, or has some of MLflow's tables and no data.

    MLflow adds the experiment "Default" last: a database with an experiment is complete, whatever the version
    of MLflow that created it.
    """
    try:
        if path.stat().st_size == 0:
            return True
    except FileNotFoundError:
        return True
    try:
        # "rw", not "ro": the journal of a killed process is rolled back first. It never creates a file.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=5)
    except sqlite3.OperationalError:
        if path.exists():
            raise
        return True  # another process has renamed it
    with closing(connection) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return True
        if "experiments" not in tables and "alembic_version" not in tables:
            return False  # the database of another program: MLflow adds its tables
        if any(
            database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
            for table in _DATA
            if table in tables
        ):
            return False
        version = None
        if "alembic_version" in tables:
            version = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return version is None or version[0] != _newest_version()


def _newest_version() -> str | None:
    """The version of the tables that the installed MLflow creates."""
    import mlflow
    from alembic.script import ScriptDirectory

    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations"
    return ScriptDirectory(str(migrations)).get_current_head()


def _rename_incomplete(path: Path) -> None:
    age = time.time() - path.stat().st_mtime
    if path.stat().st_size and 0 <= age < IDLE_SECONDS:
        raise DatabaseBusy(f"another process is creating {path}, or was interrupted just now")
    renamed = path.with_name(f"{path.name}.incomplete-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    for suffix in ("-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{renamed}{suffix}")
    os.replace(path, renamed)
    _log.warning(
        "%s is incomplete after an interrupted start and holds no run: it was renamed to %s; a new database "
        "is created",
        path,
        renamed.name,
    )


def _create(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in path.parent.glob(f".{escape(path.name)}.*.partial*"):
        with suppress(OSError):  # of a killed process: this process holds the lock
            left.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        store = SqlAlchemyStore(sqlite_address(partial), (path.parent / "mlartifacts").as_uri())
        store.engine.dispose()
        flush(partial)
        try:
            os.link(partial, path)  # unlike a rename, it fails if the file exists
        except FileExistsError:
            raise DatabaseBusy(f"another process has created {path}") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            os.rename(partial, path)  # a file system without hard links
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                os.unlink(f"{partial}{suffix}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock for the creation of a database: a file beside it, removed afterwards.

    On a file system without locks every process creates a database; the first one to be renamed stays.
    """
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DatabaseBusy(f"another process is creating {path} and holds {lock}") from None
                time.sleep(0.1)
                continue
            except OSError:
                pass
            if not _is_same(file.fileno(), lock):
                continue  # its former holder removed it; another process may have locked a new file
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

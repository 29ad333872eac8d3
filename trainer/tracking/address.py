"""MLflow's address: which one a run takes, whether MLflow can use it, and how to see what lies there."""

import difflib
import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote

from trainer.errors import RunError
from trainer.system.secrets import Address

DEFAULT = "sqlite:///mlflow.db"
VARIABLE = "MLFLOW_TRACKING_URI"

LONGEST_EXPERIMENT = 500  # characters of an experiment's name that MLflow takes

_SERVERS = ("http", "https")
_SERVER_SCHEMES = ("http://", "https://")
_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_DATABASES = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc", "sqlite": "sqlite3"}
"""MLflow's databases, and the package that SQLAlchemy takes for each where the address names none."""

_DATABRICKS = ("databricks", "databricks-uc", "uc")
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
_SQLITE_HEADER = b"SQLite format 3\x00"


def choose_address(
    given: str | None, known: str | None, variables: Mapping[str, str] = os.environ
) -> tuple[Address, str]:
    """The address that a run takes, and where it comes from, for messages.

    Args:
        given: `tracking.uri`.
        known: where the run was tracked before, without credentials.
    """
    chosen, source = next(
        (text, source)
        for text, source in (
            (given, "tracking.uri"),
            (variables.get(VARIABLE), VARIABLE),
            (known, "mlflow_run.json"),
            (DEFAULT, "the default"),
        )
        if text
    )
    address = Address(chosen)
    parts = _sqlite_parts(address)
    return (address if parts is None else Address(sqlite_address(parts[0]) + parts[1])), source


def check_address(address: Address, source: str) -> None:
    """Raises RunError for an address that MLflow cannot use, whatever the state of a server or database."""
    say = f"{source}: {str(address)!r}"
    if "\n" in address or "\x00" in address or address != address.strip():
        raise RunError(f"{say} begins or ends with a blank, or holds a line break: an address has neither")
    if address in _DATABRICKS:
        return
    scheme, separator, rest = address.partition("://")
    kind, _, driver = scheme.partition("+")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or kind.lower() == "file":
        _refuse_path(address, say)
        return
    if scheme in _SERVERS:
        _check_server(address, rest, say)
    elif kind == "sqlite":
        _check_sqlite(address, say)
    elif kind in _DATABASES:
        module = driver or _DATABASES[kind]
        if importlib.util.find_spec(module) is None:
            raise RunError(f"{say} needs the Python package {module}, which is not installed here")
    elif scheme not in (*_DATABRICKS, *(point.name for point in entry_points(group="mlflow.tracking_store"))):
        near = difflib.get_close_matches(scheme.lower(), [*_SERVERS, *_DATABASES], n=1)
        hint = f"did you mean {near[0]}://{rest}? " if near else ""
        raise RunError(f"{say}: MLflow knows no scheme {scheme!r}; {hint}{_ALLOWED}")


_ALLOWED = (
    "allowed: http://HOST:PORT or https://HOST of an MLflow server, sqlite:///FILE, or another database's "
    "address (postgresql://, mysql://, mssql://)"
)


def _refuse_path(address: Address, say: str) -> None:
    """Raises RunError for an address without a scheme, and for a folder, which MLflow 3 refuses."""
    if os.environ.get(_FILE_STORE, "").lower() in ("true", "1"):
        return
    typo = re.match(r"(https?|sqlite|postgresql|mysql|mssql)\b[:/]", address, re.I)
    server = re.fullmatch(r"[\w.-]+:\d+(/.*)?", address)
    if typo:
        hint = f"after {typo[1]} comes {':///' if typo[1].lower() == 'sqlite' else '://'}; {_ALLOWED}"
    elif server:
        hint = f"did you mean http://{address}? {_ALLOWED}"
    else:
        folder = address.removeprefix("file:").rstrip("/") or "."
        folder = "/" + folder.lstrip("/") if folder.startswith("/") else folder
        hint = (
            "MLflow 3 no longer tracks into a folder of files. Name a database, such as "
            f"sqlite:///{folder}/mlflow.db, or a server; `mlflow migrate-filestore` takes over what lies in "
            f"the folder. {_ALLOWED}"
        )
    raise RunError(f"{say}: {hint}")


def _check_server(address: Address, rest: str, say: str) -> None:
    if re.match(r"https?://[^/?#@:]+:\d{1,5}/[^@]*@", address.full):
        raise RunError(f"{say} was given with an @ after a /: write %40 for @, and in a password %2F for /")
    parts = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]*)(?::(.*))?", re.split(r"[/?#]", rest, maxsplit=1)[0])
    host, port = ("", "") if parts is None else (parts[1], parts[2])
    if not host or re.search(r"[\s@\\]", host):
        raise RunError(f"{say} names no host; {_ALLOWED}")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise RunError(
            f"{say}: {port!r} is no port, a number from 1 to 65535. In a password, write %2F for /, %3F "
            "for ?, %23 for # and %40 for @, or give it in MLFLOW_TRACKING_PASSWORD"
        )
    if "?" in rest or "#" in rest:
        raise RunError(f"{say}: a server's address has no ? and no #; {_ALLOWED}")
    if address.user_info is not None and "" in address.user_info:
        raise RunError(
            f"{say} has a user name without a password, or the other way round: write "
            "http://USER:PASSWORD@HOST, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )


def _check_sqlite(address: Address, say: str) -> None:
    path = sqlite_path(address)
    if path is None:
        raise RunError(
            f"{say} names no file: write sqlite:///FILE for one in the current directory, "
            "sqlite:////FOLDER/FILE for one elsewhere"
        )
    if path.is_dir():
        raise RunError(f"{say}: {path} is a folder; name a file in it, such as sqlite:///{path}/mlflow.db")
    try:
        with path.open("rb") as file:
            header = file.read(len(_SQLITE_HEADER))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{say}: {path} cannot be read: {error.strerror}") from error
    if header and header != _SQLITE_HEADER:
        raise RunError(f"{say}: {path} is no SQLite database; name another file")


def sqlite_path(address: str) -> Path | None:
    """The absolute path of an SQLite database; None for any other address, and for one in memory."""
    parts = _sqlite_parts(address)
    return None if parts is None else parts[0]


def _sqlite_parts(address: str) -> tuple[Path, str] | None:
    """Path and options (`?timeout=30`) of an SQLite database's address.

    The path is percent-decoded, as SQLAlchemy does, unless the file, or else the folder, exists under the
    name as it is written: folders are named `100%25`, too, or hold a `?`, which elsewhere begins the options.
    With the driver's name it is always decoded.
    """
    match = re.fullmatch(r"sqlite(\+\w+)?:///(.+)", address, re.S)
    if match is None or match[2].startswith((":memory:", "?")):
        return None
    written = Path(match[2]).absolute()
    name, mark, options = match[2].partition("?")
    decoded = Path(unquote(name)).absolute()
    for path, exists in (
        (decoded, decoded.exists),
        (written, written.exists),
        (written, lambda: written.parent != decoded.parent and written.parent.exists()),
    ):
        try:
            if exists():
                return (written, "") if path is written and not match[1] else (decoded, mark + options)
        except (OSError, ValueError):  # a name that is too long, or holds NUL
            continue
    return decoded, mark + options


def sqlite_address(path: Path | str) -> str:
    """The address under which SQLAlchemy and MLflow find a file, whatever its folder's name.

    MLflow creates the folder of an address `sqlite:///...` without decoding it; with the driver's name it
    leaves that alone.
    """
    text = str(path)
    if "%" not in text and "?" not in text:
        return f"sqlite:///{text}"
    return "sqlite+pysqlite:///" + text.replace("%", "%25").replace("?", "%3F")


def check_experiment(name: str) -> None:
    """Raises RunError for a name that MLflow takes for no experiment."""
    if len(name) > LONGEST_EXPERIMENT:
        raise RunError(
            f"tracking.experiment: {name[:40]!r}... has {len(name)} characters; MLflow takes at most "
            f"{LONGEST_EXPERIMENT}"
        )
    if "\x00" in name or name != name.encode(errors="replace").decode():
        raise RunError(f"tracking.experiment: {name!r} holds NUL, or bytes that are no UTF-8: leave them out")


def how_to_see(address: str, experiment_id: str | None, run_id: str | None) -> str:
    """How to see a run: a server's page; for a database a command for a shell, and below it the page that is
    then there. Without a run's id, which comes with the first delivery, no page of a run.
    """
    page = "" if run_id is None else run_page(experiment_id, run_id)
    if address.startswith(_SERVER_SCHEMES):
        return address.rstrip("/") + page
    command = shlex.join([mlflow_program(), "ui", "--backend-store-uri", absolute_address(address)])
    return f"{command}\n{_UI}{page}" if page else command


def run_page(experiment_id: str | None, run_id: str) -> str:
    """A run's page, below a server's address. MLflow 3 shows training runs where the page says so."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def restore_command(address: str, *, kind: str, id: str) -> str:
    """The command that restores a deleted run or experiment. kind: `runs` or `experiments`."""
    option = "--run-id" if kind == "runs" else "--experiment-id"
    return (
        f"{VARIABLE}={shlex.quote(absolute_address(address))} "
        f"{shlex.join([mlflow_program(), kind, 'restore', option, id])}"
    )


def absolute_address(address: str) -> str:
    """An address for a command that works from any folder."""
    path = sqlite_path(address)
    return address if path is None else sqlite_address(path)


def mlflow_program() -> str:
    """`mlflow` where the shell finds ours, else its path beside the running interpreter."""
    ours = Path(sys.executable).parent / "mlflow"
    found = shutil.which("mlflow")
    if found and Path(found) == ours:
        return "mlflow"
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)

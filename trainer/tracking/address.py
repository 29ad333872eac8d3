"""The address of an MLflow server or database: choosing it, checking it, and the commands that use it."""

import difflib
import http.client
import importlib.util
import os
import re
import shlex
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer.errors import RunError
from trainer.secrets import Address

DEFAULT = "sqlite:///mlflow.db"
VARIABLE = "MLFLOW_TRACKING_URI"

REPLY_TIMEOUT = 3.0  # seconds; a server that does not answer in time is not an error
LONGEST_EXPERIMENT = 500  # characters: MLflow's limit for an experiment's name

_SERVERS = ("http", "https")
_SERVER_SCHEMES = ("http://", "https://")
_HEALTH_PAGES = ("/health", "/version")  # every MLflow server has them
_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_DATABASES = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc", "sqlite": "sqlite3"}
"""MLflow's databases, and the package that SQLAlchemy imports for each if the address names no driver."""

_DATABRICKS = ("databricks", "databricks-uc", "uc")
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
_SQLITE_HEADER = b"SQLite format 3\x00"


def choose_address(
    given: str | None, known: str | None, variables: Mapping[str, str] = os.environ
) -> tuple[Address, str]:
    """The address of a run and the name of its source, for messages.

    Args:
        given: `tracking.uri`.
        known: the address that the run used before, without credentials.
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
    """Raises RunError for an address that MLflow cannot parse or has no driver for. Contacts no server."""
    prefix = f"{source}: {str(address)!r}"
    if "\n" in address or "\x00" in address or address != address.strip():
        raise RunError(f"{prefix} begins or ends with a blank or contains a line break: remove it")
    if address in _DATABRICKS:
        return
    scheme, separator, rest = address.partition("://")
    kind, _, driver = scheme.partition("+")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or kind.lower() == "file":
        _refuse_path(address, prefix)
        return
    if scheme in _SERVERS:
        _check_server_address(address, rest, prefix)
    elif kind == "sqlite":
        _check_sqlite(address, prefix)
    elif kind in _DATABASES:
        module = driver or _DATABASES[kind]
        if importlib.util.find_spec(module) is None:
            raise RunError(f"{prefix} needs the Python package {module}, which is not installed")
    elif scheme not in (*_DATABRICKS, *(point.name for point in entry_points(group="mlflow.tracking_store"))):
        near = difflib.get_close_matches(scheme.lower(), [*_SERVERS, *_DATABASES], n=1)
        hint = f"did you mean {near[0]}://{rest}? " if near else ""
        raise RunError(f"{prefix}: MLflow has no scheme {scheme!r}; {hint}{_ALLOWED}")


_ALLOWED = (
    "allowed: http://HOST:PORT or https://HOST of an MLflow server, sqlite:///FILE, or another database's "
    "address (postgresql://, mysql://, mssql://)"
)


def _refuse_path(address: Address, prefix: str) -> None:
    """Raises RunError for an address without a scheme and for a folder, which MLflow 3 refuses."""
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
            "MLflow 3 does not support folders of files. Name a database, such as "
            f"sqlite:///{folder}/mlflow.db, or a server; `mlflow migrate-filestore` imports the folder. "
            f"{_ALLOWED}"
        )
    raise RunError(f"{prefix}: {hint}")


def _check_server_address(address: Address, rest: str, prefix: str) -> None:
    if re.match(r"https?://[^/?#@:]+:\d{1,5}/[^@]*@", address.full):
        raise RunError(f"{prefix} has an @ after a /: write %40 for @, and in a password %2F for /")
    parts = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]*)(?::(.*))?", re.split(r"[/?#]", rest, maxsplit=1)[0])
    host, port = ("", "") if parts is None else (parts[1], parts[2])
    if not host or re.search(r"[\s@\\]", host):
        raise RunError(f"{prefix} names no host; {_ALLOWED}")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise RunError(
            f"{prefix}: {port!r} is no port; a port is 1 to 65535. In a password, write %2F for /, %3F "
            "for ?, %23 for # and %40 for @, or set MLFLOW_TRACKING_PASSWORD"
        )
    if "?" in rest or "#" in rest:
        raise RunError(f"{prefix}: a server's address has no ? and no #; {_ALLOWED}")
    if address.user_info is not None and "" in address.user_info:
        raise RunError(
            f"{prefix} has a user name without a password or a password without a user name: write "
            "http://USER:PASSWORD@HOST, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )


def _check_sqlite(address: Address, prefix: str) -> None:
    path = sqlite_path(address)
    if path is None:
        raise RunError(
            f"{prefix} names no file: write sqlite:///FILE, relative to the current directory, or "
            "sqlite:////FOLDER/FILE"
        )
    if path.is_dir():
        raise RunError(f"{prefix}: {path} is a folder; name a file in it, such as sqlite:///{path}/mlflow.db")
    try:
        with path.open("rb") as file:
            header = file.read(len(_SQLITE_HEADER))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{prefix}: {path} cannot be read: {error.strerror}") from error
    if header and header != _SQLITE_HEADER:
        raise RunError(f"{prefix}: {path} is no SQLite database; name another file")


def check_reachable(address: Address, source: str) -> None:
    """Contacts the server or inspects the database before training.

    Raises RunError for an unknown host name, a server that is not MLflow's and a database that cannot be
    written. A server that does not answer raises nothing: it may be down for a while.
    """
    prefix = f"{source}: {str(address)!r}"
    path = sqlite_path(address)
    if path is not None:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not os.access(existing, os.W_OK):
            raise RunError(f"{prefix}: {existing} cannot be written; name another database in tracking.uri")
    elif address.startswith(_SERVER_SCHEMES):
        _check_mlflow_server(address, prefix)


def _check_mlflow_server(address: Address, prefix: str) -> None:
    parts = urlsplit(str(address))
    if not urllib.request.getproxies().get(parts.scheme):  # a proxy resolves host names itself
        try:
            socket.getaddrinfo(parts.hostname, parts.port)
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                raise RunError(f"{prefix}: the host name {parts.hostname!r} is unknown") from None
            return
    if all(_is_missing(f"{str(address).rstrip('/')}{page}") for page in _HEALTH_PAGES):
        raise RunError(
            f"{prefix}: the server is not MLflow's: it has neither {' nor '.join(_HEALTH_PAGES)}. Check the "
            "port, and whether the address needs a path at its end"
        )


def _is_missing(page: str) -> bool:
    """Whether the server answers 404 for the page."""
    try:
        with urllib.request.urlopen(page, timeout=REPLY_TIMEOUT):
            return False
    except urllib.error.HTTPError as error:
        return error.code == http.client.NOT_FOUND
    except (OSError, http.client.HTTPException):
        return False


def sqlite_path(address: str) -> Path | None:
    """The absolute path of an SQLite database; None for any other address and for a database in memory."""
    parts = _sqlite_parts(address)
    return None if parts is None else parts[0]


def _sqlite_parts(address: str) -> tuple[Path, str] | None:
    """Path and options (`?timeout=30`) of an SQLite database's address.

    SQLAlchemy percent-decodes the path, and `?` begins the options. A folder's name may contain `%25` or `?`
    itself: if the file or its folder exists under the undecoded name, that name is used. An address with the
    driver's name (`sqlite+pysqlite`) is always decoded.
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
        except (OSError, ValueError):  # a name that is too long or contains NUL
            continue
    return decoded, mark + options


def sqlite_address(path: Path | str) -> str:
    """The address of an SQLite file for SQLAlchemy and MLflow; works for any folder name.

    For `sqlite:///...` MLflow creates the folder of the undecoded path. For `sqlite+pysqlite:///...` it
    creates none.
    """
    text = str(path)
    if "%" not in text and "?" not in text:
        return f"sqlite:///{text}"
    return "sqlite+pysqlite:///" + text.replace("%", "%25").replace("?", "%3F")


def check_experiment(name: str) -> None:
    """Raises RunError for an experiment name that MLflow refuses."""
    if len(name) > LONGEST_EXPERIMENT:
        raise RunError(
            f"tracking.experiment: {name[:40]!r}... has {len(name)} characters; MLflow allows at most "
            f"{LONGEST_EXPERIMENT}"
        )
    if "\x00" in name or name != name.encode(errors="replace").decode():
        raise RunError(f"tracking.experiment: {name!r} contains NUL or bytes that are not UTF-8: remove them")


def how_to_see(address: str, experiment_id: str | None, run_id: str | None) -> str:
    """How to view a run: the URL on a server; for a database a shell command, and the URL on a second line.

    Before the first upload the run has no id, and the text has no URL of the run.
    """
    # MLflow 3 shows training runs only for this workflowType.
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning" if run_id else ""
    if address.startswith(_SERVER_SCHEMES):
        return address.rstrip("/") + page
    command = shlex.join([mlflow_program(), "ui", "--backend-store-uri", absolute_address(address)])
    return f"{command}\n{_UI}{page}" if page else command


def restore_command(address: str, *, kind: str, id: str) -> str:
    """The command that restores a deleted run or experiment. kind: `runs` or `experiments`."""
    option = "--run-id" if kind == "runs" else "--experiment-id"
    return (
        f"{VARIABLE}={shlex.quote(absolute_address(address))} "
        f"{shlex.join([mlflow_program(), kind, 'restore', option, id])}"
    )


def absolute_address(address: str) -> str:
    """The address with an absolute path, for a command that works from any folder."""
    path = sqlite_path(address)
    return address if path is None else sqlite_address(path)


def mlflow_program() -> str:
    """`mlflow` if the shell finds the one of this environment, else its path."""
    ours = Path(sys.executable).parent / "mlflow"
    found = shutil.which("mlflow")
    if found and Path(found) == ours:
        return "mlflow"
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)

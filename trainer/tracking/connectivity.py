"""Whether a run's address can be that of an MLflow server or database at all, asked once before training."""

import http.client
import os
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from trainer.errors import RunError
from trainer.system.secrets import Address
from trainer.tracking.address import sqlite_path

REPLY_TIMEOUT = 3.0  # seconds for an answer; a server that is slow or away is no mistake
_PAGES = ("/health", "/version")  # of every MLflow server


def check_reachable(address: Address, source: str) -> None:
    """Raises RunError for a host that is not known, a server that is not MLflow's, and a database that cannot
    be written. A server that does not answer is an outage, and none of these.
    """
    path = sqlite_path(address)
    if path is not None:
        _check_writable(path, f"{source}: {str(address)!r}")
    elif address.startswith(("http://", "https://")):
        _check_server(address, f"{source}: {str(address)!r}")


def _check_writable(path: Path, say: str) -> None:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(there, os.W_OK):
        raise RunError(f"{say}: {there} cannot be written; name a database elsewhere with tracking.uri")


def _check_server(address: Address, say: str) -> None:
    parts = urlsplit(str(address))
    if not urllib.request.getproxies().get(parts.scheme):  # else the proxy alone may know the host
        try:
            socket.getaddrinfo(parts.hostname, parts.port)
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                raise RunError(f"{say}: no host is known by the name {parts.hostname!r} here") from None
            return
    if all(_is_missing(f"{str(address).rstrip('/')}{page}") for page in _PAGES):
        raise RunError(
            f"{say}: what answers there is no MLflow server: it has neither {' nor '.join(_PAGES)}. Is it "
            "another port, or is a path missing at the end?"
        )


def _is_missing(page: str) -> bool:
    """Whether a server answers that it has no such page."""
    try:
        with urllib.request.urlopen(page, timeout=REPLY_TIMEOUT):
            return False
    except urllib.error.HTTPError as error:
        return error.code == http.client.NOT_FOUND
    except (OSError, ssl.SSLError, http.client.HTTPException):
        return False

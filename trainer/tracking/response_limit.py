"""A size limit for a server's responses, which MLflow's HTTP client lacks.

MLflow creates its sessions with the adapter class that is replaced here. The connections of the new adapter
count the bytes of each response, including headers, retries and redirects. The decompressed body is counted
separately.
"""

import http.client
import io
from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

LONGEST_REPLY = 64 * 2**20
"""Bytes. MLflow's longest response to a run's requests is one run with its metrics: below 1 MiB."""


class ReplyTooLong(OSError):
    """A response has more than `LONGEST_REPLY` bytes; the rest is not read."""

    def __init__(self) -> None:
        super().__init__(
            f"the response is longer than {LONGEST_REPLY / 2**20:.3g} MiB and was not read: check that the "
            "address is that of an MLflow server"
        )


def limit_replies() -> None:
    """Limit the responses of all HTTP sessions that MLflow creates after this call."""
    from mlflow.utils import request_utils

    if not getattr(request_utils.TCPKeepAliveHTTPAdapter, "limits_replies", False):
        request_utils.TCPKeepAliveHTTPAdapter = _limited(request_utils.TCPKeepAliveHTTPAdapter)


def _limited(adapter: Any) -> Any:
    class LimitedAdapter(adapter):
        limits_replies = True

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = _POOLS

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = _POOLS
            return manager

        def build_response(self, *args: Any, **kwargs: Any) -> Any:
            response = super().build_response(*args, **kwargs)
            response.raw = _LimitedBody(response.raw)
            return response

    return LimitedAdapter


class _LimitedReader(io.RawIOBase):
    """A socket's file for one response; raises ReplyTooLong after `LONGEST_REPLY` bytes."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._left = LONGEST_REPLY

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self._raw.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise ReplyTooLong
        return count

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(_LimitedReader(self.fp.detach()))


def _limited_pool(pool: type[HTTPConnectionPool], connection: type) -> type[HTTPConnectionPool]:
    limited = type("LimitedConnection", (connection,), {"response_class": _Reply})
    return type("LimitedPool", (pool,), {"ConnectionCls": limited})


_POOLS = {
    "http": _limited_pool(HTTPConnectionPool, HTTPConnection),
    "https": _limited_pool(HTTPSConnectionPool, HTTPSConnection),
}


class _LimitedBody:
    """A response's body; raises ReplyTooLong after `LONGEST_REPLY` decompressed bytes."""

    def __init__(self, body: urllib3.BaseHTTPResponse) -> None:
        self._body = body

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        left = LONGEST_REPLY
        for part in self._body.stream(*args, **kwargs):
            left -= len(part)
            if left < 0:
                raise ReplyTooLong
            yield part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

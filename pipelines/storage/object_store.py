"""Objects of S3-compatible stores, by URL: reads of byte ranges, sizes and uploads, with retries.

A store that is away must not make a run call its videos bad. So the errors have two types: `VideoError` for
an object that is missing or too short, and `StoreUnavailable`, which ends the run, for everything else.
Credentials and the endpoint come from the environment and the configuration files of AWS, and from nowhere
else: a URL with credentials is refused.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable

Result = TypeVar("Result")

PATIENCE = 300.0
"""Seconds after the first failure during which a request is repeated. Below the time after which a run counts
as hanging (`hang_minutes`)."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two attempts; each wait is twice the one before
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MISSING = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchVersion"})
_REFUSED = frozenset(
    {"NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403"}
)
"""Codes of a store's answers that are the same at the next attempt."""
_BEYOND_END = frozenset({"InvalidRange", "416"})

logger = logging.getLogger(__name__)


class StoreUnavailable(DataError):
    """A store does not answer, or refuses all requests: no property of one video."""


def is_url(text: str) -> bool:
    """Whether a path names an object of a store: `s3://bucket/key`."""
    return _SCHEME.match(text) is not None


def check_url(url: str) -> str:
    """The URL, if it is one of this program's stores and holds no credentials.

    Raises DataError.
    """
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    rest = url[found.end() :] if found else url
    bucket, _, key = rest.partition("/")
    # The address is not quoted as a whole where it may hold a password.
    if "@" in bucket or "?" in rest:
        raise DataError(
            f"a URL of {scheme}:// has credentials or parameters in it; remove them, and give the "
            "credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE)"
        )
    if scheme != "s3":
        raise DataError(f"{printable(url)}: expected s3://BUCKET/KEY; other stores are not supported")
    if not bucket or not key.strip("/"):
        raise DataError(f"{printable(url)}: expected s3://BUCKET/KEY")
    return url


class ObjectReplaced(VideoError):
    """An object is not the one that was asked for: another one was stored under its URL."""


def read_ranges(
    url: str, ranges: Sequence[tuple[int, int]], *, patience: float = PATIENCE, version: str = ""
) -> list[bytes]:
    """The bytes of an object in each range, with one request each, all at the same time.

    Args:
        ranges: begin and end, with begin < end.
        version: of the object, as from `object_info`; empty for any.

    Raises:
        VideoError: there is no such object, or it ends before the end of a range.
        ObjectReplaced: the object has another version.
        StoreUnavailable: the store does not answer for `patience` seconds, or refuses the request.
    """
    if not ranges:
        return []
    parts = _attempt(url, lambda store: _get(store, url, ranges), patience)
    for (part, found), (begin, end) in zip(parts, ranges, strict=True):
        if version and found != version:
            raise ObjectReplaced("was replaced in the store while it was read")
        if len(part) != end - begin:
            raise VideoError(f"shard ends after {begin + len(part)} of {end} bytes")
    return [part for part, _ in parts]


def _get(store: Any, url: str, ranges: Sequence[tuple[int, int]]) -> list[tuple[bytes, str]]:
    """The bytes of each range, with the version of the object that they are from."""
    from fsspec.asyn import sync

    bucket, key, _ = store.split_path(url)

    async def get(begin: int, end: int) -> tuple[bytes, str]:
        # Not cat_file, whose result is without the object's ETag. The public call_s3 is not a coroutine.
        answer = await store._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}")
        async with answer["Body"] as body:
            return await body.read(), _version(answer)

    async def get_all() -> list[tuple[bytes, str] | BaseException]:
        # Waits for all, so that no download of this attempt goes on beside those of the next.
        return await asyncio.gather(*(get(begin, end) for begin, end in ranges), return_exceptions=True)

    found: list[tuple[bytes, str]] = []
    for part in sync(store.loop, get_all):
        if isinstance(part, BaseException):
            raise part
        found.append(part)
    return found


class ObjectInfo(NamedTuple):
    """What a store says of an object."""

    size: int
    """Bytes."""
    version: str
    """Changes when the object is replaced: its ETag, or else the time at which it was stored."""


def object_info(url: str, *, patience: float = PATIENCE) -> ObjectInfo:
    """Size and version of an object, with one request; raises as `read_ranges` does."""
    answer = _attempt(url, lambda store: store.info(url, refresh=True), patience)
    return ObjectInfo(int(answer["size"]), _version(answer))


def object_size(url: str, *, patience: float = PATIENCE) -> int:
    """Bytes of an object; raises as `read_ranges` does."""
    return object_info(url, patience=patience).size


def _version(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag") or answer.get("LastModified") or "")


def upload(file: Path, url: str, *, patience: float = PATIENCE) -> None:
    """Store a file as an object, which appears once it is complete; replaces an older one.

    Raises StoreUnavailable.
    """
    try:
        _attempt(url, lambda store: store.put_file(str(file), url), patience)
    except VideoError as error:
        raise StoreUnavailable(f"{printable(url)} {error}") from error


def _attempt(url: str, request: Callable[[Any], Result], patience: float) -> Result:
    """The result of a request, repeated with growing pauses while the store does not answer."""
    check_url(url)
    store = _filesystem(url.partition("://")[0].lower())
    deadline: float | None = None
    wait = _FIRST_WAIT
    while True:
        try:
            return request(store)
        except Exception as error:
            code = _code(error)
            if code in _BEYOND_END:
                raise VideoError("is shorter than the manifest says") from error
            if code in _MISSING or (isinstance(error, FileNotFoundError) and code not in _REFUSED):
                raise VideoError("cannot be read: the store has no such object") from error
            reason = _reason(error, code)
            if code in _REFUSED or isinstance(error, PermissionError) or _lacks_credentials(error):
                raise StoreUnavailable(
                    f"{printable(url)} cannot be read or written: {reason}. Check the bucket and the "
                    "credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws)"
                ) from error
            now = time.monotonic()
            deadline = now + patience if deadline is None else deadline
            if now >= deadline:
                raise StoreUnavailable(
                    f"the store of {printable(url)} has not answered for {patience:g} s: {reason}. Check it, "
                    "and the address in AWS_ENDPOINT_URL; then start again"
                ) from error
            # Ranks and workers fail together; they should not all come back at the same time.
            pause = min(wait * random.uniform(0.5, 1.0), deadline - now)
            logger.warning(
                "%s: %s; next attempt in %.1f s, the last one in %.0f s",
                printable(url), reason, pause, deadline - now,
            )  # fmt: skip
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)


def _code(error: BaseException | None) -> str:
    """The code in a store's answer, such as NoSuchKey; empty if it has not answered."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def _reason(error: Exception, code: str) -> str:
    """The error without what a store sends back of the request, in which there may be keys."""
    if code:
        return f"the store answers {printable(code)}"
    name = type(error).__name__
    return f"{name}: {error.strerror}" if isinstance(error, OSError) and error.strerror else name


def _lacks_credentials(error: Exception) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


@cache
def _filesystem(scheme: str) -> Any:
    """One client for each process: it holds connections and a thread.

    Raises DataError where the client is not installed.
    """
    import fsspec  # 0.1 s, which runs without a store do not need

    try:
        return fsspec.filesystem(
            scheme,
            use_listings_cache=False,  # would grow with the number of shards
            config_kwargs={
                "connect_timeout": 10,
                "read_timeout": 60,
                "max_pool_connections": 16,
                "retries": {"total_max_attempts": 1},  # `_attempt` repeats requests, and logs it
            },
        )
    except ImportError as error:
        raise DataError(
            f"{scheme}:// needs a client that is not installed: pip install 'uniformerv2-trainer[s3]'"
        ) from error

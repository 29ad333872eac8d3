"""An HTTP server for one model: a page that accepts a dropped video, and a JSON interface.

Uploads are untrusted. They are decoded in a separate process, which is killed after a timeout. File names are
chosen by the server. Requests from other web pages are refused.
"""

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pipelines.formatting import printable
from trainer.errors import RunError
from trainer.serving.inference_process import CrashedError, InferenceProcess, TimedOutError
from trainer.serving.video_requests import VideoRequest

PAGE = Path(__file__).with_name("page.html")
_MOST_TOP = 100
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request.

    upload: bytes of an upload.
    seconds: for upload, waiting and inference together.
    waiting: number of requests that may wait for the model.
    """

    upload: int
    seconds: float
    waiting: int


class RefusedError(Exception):
    """A request that is answered with an HTTP error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class VideoServer:
    """The web application.

    inference: the process with the model.
    limits: of one request.
    host: address that the server listens on.
    folder: for uploads, used by this server only.
    description: JSON values for `/about`.
    log: receives one line per video.
    """

    inference: InferenceProcess
    limits: RequestLimits
    host: str
    folder: Path
    description: dict[str, Any]
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._names = _own_names(self.host)
        self._any_address = self.host in ("0.0.0.0", "::")
        self._open_requests = 0
        self._model_lock = asyncio.Lock()
        page = PAGE.read_text(encoding="utf-8")
        self._page, policy = page, _content_policy(page)
        self._page_headers = {**_HEADERS, "Content-Security-Policy": policy}

    def application(self) -> Starlette:
        routes = [
            Route("/", self._checked(self._show_page)),
            Route("/about", self._checked(self._send_description)),
            Route("/predict", self._checked(self._predict), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self._while_serving)

    @asynccontextmanager
    async def _while_serving(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.inference.close()  # otherwise a thread that waits for the process would keep the server alive

    def _checked(
        self, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            try:
                self._check_sender(request)
                return await handle(request)
            except RefusedError as error:
                headers = {**_HEADERS, "Retry-After": "5"} if error.status == 503 else _HEADERS
                return JSONResponse({"error": str(error)}, error.status, headers)

        return checked

    def _check_sender(self, request: Request) -> None:
        """Refuse requests that another web page makes a browser send.

        Such a page may have a host name that resolves to this server (DNS rebinding), or send requests across
        sites.
        """
        host = request.headers.get("host", "")
        name = _name_of(host)
        if name not in self._names and not (self._any_address and _is_address(name)):
            raise RefusedError(403, f"the Host header {printable(host[:100])!r} does not name this server")
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site", "none")
        foreign = origin is not None and origin.partition("://")[2] != host
        if request.method == "POST" and (foreign or site not in ("none", "same-origin")):
            raise RefusedError(403, "requests from other web pages are refused")

    async def _show_page(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def _send_description(self, _: Request) -> Response:
        limits = {"upload_limit": self.limits.upload, "seconds": self.limits.seconds}
        return JSONResponse({**self.description, **limits}, headers=_HEADERS)

    async def _predict(self, request: Request) -> Response:
        top, attention = _options(request)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RefusedError(415, "send the video itself as the body: curl --data-binary @VIDEO")
        if int(request.headers.get("content-length", "0")) > self.limits.upload:  # uvicorn checks its form
            raise RefusedError(413, self._too_large())
        if self._open_requests > self.limits.waiting:
            raise RefusedError(503, "busy with other videos; try again in a few seconds")
        began = time.monotonic()
        path = self.folder / secrets.token_hex(16)
        self._open_requests += 1
        try:
            size = await self._receive(request, path)
            video_request = VideoRequest(path, top, attention)
            found = await self._call_model(video_request, began)
        finally:
            self._open_requests -= 1
            path.unlink(missing_ok=True)
        seconds = time.monotonic() - began
        outcome = found["error"] if "error" in found else found["top"][0]["class"]
        self.log(f"{size / 1e6:.1f} MB in {seconds:.1f} s: {printable(outcome)}")
        if "error" in found:
            raise RefusedError(422, f"the upload {found['error']}")
        return Response(json.dumps(found), media_type="application/json", headers=_HEADERS)

    async def _receive(self, request: Request, path: Path) -> int:
        size = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                with open(path, "xb") as file:
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size > self.limits.upload:
                            raise RefusedError(413, self._too_large())
                        file.write(chunk)
        except TimeoutError:
            raise RefusedError(408, f"the upload took longer than {self.limits.seconds:.0f} s") from None
        except ClientDisconnect:
            raise RefusedError(400, "the upload was interrupted") from None
        except OSError as error:
            raise RefusedError(507, f"the upload cannot be stored: {error.strerror}") from None
        if size == 0:
            raise RefusedError(422, "the upload is empty")
        return size

    async def _call_model(self, video_request: VideoRequest, began: float) -> dict[str, Any]:
        """Process one video at a time. The time limit of a request includes waiting for the model."""
        timed_out = RefusedError(504, f"it took longer than {self.limits.seconds:.0f} s")
        try:
            async with asyncio.timeout(self._left(began)):
                await self._model_lock.acquire()
        except TimeoutError:
            raise timed_out from None
        try:
            # Not inside the timeout above: the thread would continue, and two videos would run at once.
            found: dict[str, Any] = await asyncio.to_thread(
                self.inference.call, video_request, self._left(began)
            )
        except TimedOutError:
            raise timed_out from None
        except CrashedError as error:
            raise RefusedError(422, f"the upload cannot be used: {error}") from None
        except RunError as error:
            self.log(str(error))
            raise RefusedError(500, "internal error, see the output of the server") from None
        finally:
            self._model_lock.release()
        return found

    def _left(self, began: float) -> float:
        return max(0.0, self.limits.seconds - (time.monotonic() - began))

    def _too_large(self) -> str:
        return f"the upload is larger than {self.limits.upload / 1e6:.0f} MB"


def _options(request: Request) -> tuple[int, bool]:
    top = request.query_params.get("top", "5")
    if not re.fullmatch("[0-9]{1,3}", top) or not 1 <= int(top) <= _MOST_TOP:
        raise RefusedError(400, f"top must be a number from 1 to {_MOST_TOP}")
    return int(top), request.query_params.get("attention") == "1"


def _own_names(host: str) -> set[str]:
    """Host names of this server, without a port."""
    machine = socket.gethostname().lower(), socket.getfqdn().lower()
    return {"localhost", "127.0.0.1", "[::1]", _name_of(host), *machine}


def _name_of(host: str) -> str:
    """The part of a Host header before the port; an IPv6 address in brackets."""
    if host.count(":") > 1 and not host.startswith("["):
        return f"[{host.lower()}]"
    return re.sub(r":\d*$", "", host).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _content_policy(page: str) -> str:
    """A policy that allows only the page's own script and style, and requests to this server."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

"""HTTP around one model: a page to drop a video on, and the same as JSON.

The files come from strangers, so each is decoded in a process of its own, which is killed when it takes too
long; nothing that a client sends is used as a file's name; what comes from other web pages is refused.
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
    """Of one request: bytes of an upload, and seconds for upload, waiting and inference together. waiting:
    requests that may be under way beside the one whose video is at the model.
    """

    upload: int
    seconds: float
    waiting: int


class RefusedError(Exception):
    """A request that gets no answer but an error."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class VideoServer:
    """The application's state. host: that the server listens on. folder: its own, for uploads; log: a line
    for each video.
    """

    def __init__(
        self,
        inference: InferenceProcess,
        limits: RequestLimits,
        *,
        host: str,
        folder: Path,
        about: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self._inference = inference
        self._limits = limits
        self._names = _own_names(host)
        self._any_address = host in ("0.0.0.0", "::")
        self._folder = folder
        self._about = {**about, "upload_limit": limits.upload, "seconds": limits.seconds}
        self._log = log
        self._under_way = 0
        self._at_the_model = asyncio.Lock()
        page = PAGE.read_text(encoding="utf-8")
        self._page, policy = page, _content_policy(page)
        self._page_headers = {**_HEADERS, "Content-Security-Policy": policy}

    def application(self) -> Starlette:
        routes = [
            Route("/", self._checked(self._show_page)),
            Route("/about", self._checked(self._tell_about)),
            Route("/predict", self._checked(self._predict), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self._while_serving)

    @asynccontextmanager
    async def _while_serving(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._inference.close()  # a thread that waits for its answer would keep this process

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
        """Refuse what a web page of somebody else makes a browser send: one whose own name leads here (DNS
        rebinding), or one that sends to this address from its own.
        """
        host = request.headers.get("host", "")
        name = _name_of(host)
        if name not in self._names and not (self._any_address and _is_address(name)):
            raise RefusedError(403, f"this server is not {printable(host[:100]) or 'nobody'}")
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site", "none")
        foreign = origin is not None and origin.partition("://")[2] != host
        if request.method == "POST" and (foreign or site not in ("none", "same-origin")):
            raise RefusedError(403, "another web page may not send videos here")

    async def _show_page(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def _tell_about(self, _: Request) -> Response:
        return JSONResponse(self._about, headers=_HEADERS)

    async def _predict(self, request: Request) -> Response:
        top, attention = _options(request)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RefusedError(415, "send the video itself as the body: curl --data-binary @VIDEO")
        if _declared_length(request) > self._limits.upload:
            raise RefusedError(413, self._too_large())
        if self._under_way > self._limits.waiting:
            raise RefusedError(503, "busy with other videos; try again in some seconds")
        began = time.monotonic()
        path = self._folder / secrets.token_hex(16)
        self._under_way += 1
        try:
            size = await self._receive(request, path)
            question = VideoRequest(path, top, attention)
            found = await self._answer(question, began)
        finally:
            self._under_way -= 1
            path.unlink(missing_ok=True)
        seconds = time.monotonic() - began
        words = found["error"] if "error" in found else found["top"][0]["class"]
        self._log(f"{size / 1e6:.1f} MB in {seconds:.1f} s: {printable(words)}")
        if "error" in found:
            raise RefusedError(422, f"the upload {found['error']}")
        return Response(json.dumps(found), media_type="application/json", headers=_HEADERS)

    async def _receive(self, request: Request, path: Path) -> int:
        size = 0
        try:
            async with asyncio.timeout(self._limits.seconds):
                with open(path, "xb") as file:
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size > self._limits.upload:
                            raise RefusedError(413, self._too_large())
                        file.write(chunk)
        except TimeoutError:
            raise RefusedError(408, f"the upload took longer than {self._limits.seconds:.0f} s") from None
        except ClientDisconnect:
            raise RefusedError(400, "the upload was broken off") from None
        except OSError as error:
            raise RefusedError(507, f"the upload cannot be kept: {error.strerror}") from None
        if size == 0:
            raise RefusedError(422, "the upload is empty")
        return size

    async def _answer(self, question: VideoRequest, began: float) -> dict[str, Any]:
        """One video at a time. What is waited for is part of a request's time."""
        late = RefusedError(504, f"it took longer than {self._limits.seconds:.0f} s")
        try:
            async with asyncio.timeout(self._left(began)):
                await self._at_the_model.acquire()
        except TimeoutError:
            raise late from None
        try:
            # Not inside the time-out above: the thread would go on, and the next video would come beside it.
            found: dict[str, Any] = await asyncio.to_thread(self._inference.call, question, self._left(began))
        except TimedOutError:
            raise late from None
        except CrashedError as error:
            raise RefusedError(422, f"the upload cannot be used: {error}") from None
        except RunError as error:
            self._log(str(error))
            raise RefusedError(500, "a defect in this program; its output says more") from None
        finally:
            self._at_the_model.release()
        return found

    def _left(self, began: float) -> float:
        return max(0.0, self._limits.seconds - (time.monotonic() - began))

    def _too_large(self) -> str:
        return f"the upload is larger than {self._limits.upload / 1e6:.0f} MB"


def _options(request: Request) -> tuple[int, bool]:
    top = request.query_params.get("top", "5")
    if not re.fullmatch("[0-9]{1,3}", top) or not 1 <= int(top) <= _MOST_TOP:
        raise RefusedError(400, f"top is a number from 1 to {_MOST_TOP}")
    return int(top), request.query_params.get("attention") == "1"


def _declared_length(request: Request) -> int:
    """What the client says it sends; uvicorn has refused what is no number."""
    return int(request.headers.get("content-length", "0"))


def _own_names(host: str) -> set[str]:
    """What a browser may call this server, without a port."""
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
    """Only the page's own script and style run, and it speaks to nobody but this server."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

"""Starts the server: loads the model, listens, and shuts down in order."""

import socket
import sys
import tempfile
from functools import partial
from pathlib import Path

import uvicorn

from pipelines.formatting import printable
from trainer.errors import RunError
from trainer.serving.inference_process import InferenceProcess
from trainer.serving.server import RequestLimits, VideoServer
from trainer.serving.video_requests import VideoModel

_print_line = partial(print, flush=True)
_GRACE = 3  # seconds for running requests when the server shuts down


def serve(model: VideoModel, limits: RequestLimits, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, whose handlers are then called. port: 0 chooses a free one.

    Raises RunError if the model cannot be loaded or the server cannot listen on the address.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another with --port"
        ) from error
    with listening, tempfile.TemporaryDirectory(prefix="uploads-") as folder:
        _print_line(f"loading {printable(model.source)}")
        inference = InferenceProcess(model)
        try:
            description = inference.start()
            server = VideoServer(
                inference, limits, host=host, folder=Path(folder), description=description, log=_print_line
            )
            shown = f"[{host}]" if ":" in host else host
            port = listening.getsockname()[1]
            _print_line(
                f"{description['classes']} classes on {description['device']}; http://{shown}:{port}/"
            )
            if host not in ("127.0.0.1", "::1", "localhost"):
                print(
                    f"warning: everyone who can reach port {port} of this machine can send videos; there is "
                    "no password and no encryption",
                    file=sys.stderr,
                    flush=True,
                )
            config = uvicorn.Config(
                server.application(),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                http="h11",
                timeout_keep_alive=5,
                timeout_graceful_shutdown=_GRACE,
                limit_concurrency=64,
                h11_max_incomplete_event_size=2**14,
            )
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            inference.close()

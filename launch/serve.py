"""Serve a model over HTTP: a page that accepts a dropped video, and a JSON interface.

    python launch/serve.py runs/quickstart
    python launch/serve.py weights.safetensors --port 9000 --upload-limit 500 --timeout 300
    curl --data-binary @dance.mp4 'http://127.0.0.1:8000/predict?top=3'

It listens on this machine only; --host 0.0.0.0 lets others send videos, without a password. One video is
processed at a time, in a process that is killed if a request takes longer than --timeout. Exit codes: 2 an
error that the message explains, 130 Ctrl-C, 143 SIGTERM; never 0.
"""

# The model's process imports this file again: heavy imports are inside `main`.
import argparse
from pathlib import Path

from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_on_sigterm, exit_with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="a run directory, a checkpoint, or a file of weights")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="0 chooses a free one (%(default)s)")
    add("--upload-limit", type=float, default=200, metavar="MB", help="(%(default)s)")
    add("--timeout", type=float, default=120, metavar="SECONDS", help="(%(default)s)")
    add("--waiting", type=int, default=4, metavar="N", help="requests that may wait (%(default)s)")
    add("--last", action="store_true", help="of a run, the weights of the last step")
    add("--frames", type=int, help="frames per clip, for a released checkpoint")
    add("--classes", type=Path, help="class names, one per line, in the order of the outputs")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (%(default)s)")
    parsed = parser.parse_args(arguments)
    for name, least, most in (("upload_limit", 0.001, 1e6), ("timeout", 0.1, 86_400), ("waiting", 0, 1000)):
        if not least <= getattr(parsed, name) <= most:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(parsed, name):g}: must be {least:g} to {most:,.0f}"
            )
    if not 0 <= parsed.port < 65536:
        parser.error(f"--port {parsed.port}: must be 0 to 65535")
    return parsed


@prints_errors
def main() -> int:
    arguments = parse()
    exit_on_sigterm("uploads are removed")
    from pipelines.dataset.prepare.class_names import read_class_names
    from trainer.serving.serve import serve
    from trainer.serving.server import RequestLimits
    from trainer.serving.video_requests import VideoModel

    names = None if arguments.classes is None else tuple(read_class_names(arguments.classes))
    model = VideoModel(arguments.source, arguments.device, arguments.last, arguments.frames, names)
    limits = RequestLimits(int(arguments.upload_limit * 1e6), arguments.timeout, arguments.waiting)
    serve(model, limits, host=arguments.host, port=arguments.port)
    return 0


if __name__ == "__main__":
    exit_with(main, "interrupted; uploads are removed")

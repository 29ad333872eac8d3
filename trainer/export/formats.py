"""The formats by name, each written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.formatting import printable
from trainer.errors import RunError
from trainer.export.export_source import ExportSource
from trainer.export.huggingface import write_hub_folder
from trainer.export.onnx_file import check_packages, write_onnx
from trainer.export.torch_program import write_program


@dataclass(frozen=True)
class ExportFormat:
    """write: makes a file or folder and returns the largest difference of a logit. default: its name."""

    write: Callable[[ExportSource, Path], float]
    default: str


FORMATS = {
    "onnx": ExportFormat(write_onnx, "model.onnx"),
    "torch": ExportFormat(write_program, "model.pt2"),
    "huggingface": ExportFormat(write_hub_folder, "model"),
}


def check_export(name: str, out: Path) -> None:
    """Raises RunError for what cannot be written, before anything is read."""
    if name == "onnx":
        check_packages()
    if not out.absolute().parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {out.absolute().parent}")
    try:
        os.fsencode(out.absolute()).decode()
    except UnicodeDecodeError as error:  # PyTorch ends the process over it, ONNX Runtime raises TypeError
        raise RunError(
            f"{printable(out.absolute())} cannot be written: the libraries that write it need a path that is "
            "UTF-8; name another with --out"
        ) from error
    if out.is_dir():
        raise RunError(f"{out} is a folder that is there already; name another with --out, or remove it")
    if name == "huggingface" and os.path.lexists(out):
        raise RunError(f"{out} is a file, and a folder is to be written; name another with --out")


def export_as(name: str, source: ExportSource, out: Path) -> float:
    """Write the model in the format of this name; returns how far its logits are from the model's.

    A file of that name is replaced once the new one has been loaded and compared. Raises RunError where the
    logits are too far, or where it cannot be written; then nothing is left.
    """
    check_export(name, out)
    room = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(room, ignore_errors=True)  # of an export that was killed
        room.mkdir()
        difference = FORMATS[name].write(source, room / out.name)
        # Weights beside an ONNX file come first: its name says that all is there.
        for path in sorted(room.iterdir(), key=lambda path: path.name == out.name):
            path.replace(out.with_name(path.name))
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return difference

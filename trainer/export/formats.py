"""The export formats by name. Each export is written atomically."""

import os
import tempfile
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
    """An export format.

    write: writes a file or folder and returns the largest difference of a logit.
    default: default name of the file or folder.
    """

    write: Callable[[ExportSource, Path], float]
    default: str


FORMATS = {
    "onnx": ExportFormat(write_onnx, "model.onnx"),
    "torch": ExportFormat(write_program, "model.pt2"),
    "huggingface": ExportFormat(write_hub_folder, "model"),
}


def check_export(name: str, out: Path) -> None:
    """Raises RunError for an output that cannot be written, before the model is read."""
    if name == "onnx":
        check_packages()
    if not out.absolute().parent.is_dir():
        raise RunError(f"{out} cannot be written: the folder {out.absolute().parent} does not exist")
    try:
        os.fsencode(out.absolute()).decode()
    except UnicodeDecodeError as error:  # PyTorch aborts the process, ONNX Runtime raises TypeError
        raise RunError(
            f"{printable(out.absolute())} cannot be written: the export libraries need a UTF-8 path; name "
            "another with --out"
        ) from error
    if out.is_dir():
        raise RunError(f"{out} is an existing folder; name another with --out")
    if name == "huggingface" and os.path.lexists(out):
        raise RunError(f"{out} is a file, and the format is a folder; name another with --out")


def export_as(name: str, source: ExportSource, out: Path) -> float:
    """Write the model in the named format; returns the largest difference of a logit.

    The new file is loaded and compared with the model before it replaces an existing file. Raises RunError,
    and leaves no files, if the logits differ too much or the output cannot be written.
    """
    check_export(name, out)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as folder:
            difference = FORMATS[name].write(source, Path(folder) / out.name)
            # Weights beside an ONNX file are renamed first: the ONNX file marks the export as complete.
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == out.name):
                path.replace(out.with_name(path.name))
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    return difference

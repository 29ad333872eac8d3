"""Export to ONNX."""

import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import RunError
from trainer.export.export_source import ExportSource
from trainer.export.numeric_check import TRACED_BATCH, check_agreement, random_clips
from trainer.export.public_metadata import describe_model
from trainer.export.torch_program import trace

INPUT, OUTPUT = "clips", "logits"
_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raises RunError if a package for the export is not installed."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise RunError(f'--format onnx needs {", ".join(missing)}: pip install "uniformerv2-trainer[export]"')


def write_onnx(source: ExportSource, path: Path) -> float:
    """Write an ONNX file with a dynamic batch size; returns the largest difference of a logit.

    Weights above 2 GB, protobuf's limit, go to a second file. `metadata_props` has the description, each
    value as JSON. Raises RunError if a package is missing or the logits differ too much; the caller deletes
    the files.
    """
    check_packages()
    for name in ("onnx_ir", "onnxscript", "torch.onnx"):  # they log every node that they do not simplify
        logging.getLogger(name).setLevel(logging.ERROR)
    model = source.weights.model
    clips = random_clips(model.config, TRACED_BATCH)
    program = torch.onnx.export(
        trace(model), (clips,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert program is not None  # as always with dynamo
    for name, value in describe_model(source).items():
        program.model.metadata_props[name] = json.dumps(value, ensure_ascii=False)
    program.save(path)
    return check_agreement(model, _runtime(path), "ONNX file")


def _runtime(path: Path) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run([OUTPUT], {INPUT: clips.numpy()})[0])

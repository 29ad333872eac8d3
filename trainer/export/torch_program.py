"""Export with `torch.export`: a graph that PyTorch loads without this project's code."""

import json
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from models import UniFormerV2
from trainer.export.export_source import ExportSource
from trainer.export.numeric_check import TRACED_BATCH, check_agreement, random_clips
from trainer.export.public_metadata import describe_model

DESCRIPTION = "uniformerv2.json"
"""Name of the description in the file, for `torch.export.load(FILE, extra_files={DESCRIPTION: ""})`."""


def trace(model: UniFormerV2) -> ExportedProgram:
    """The graph of the model in evaluation mode, for any number of clips."""
    clips = random_clips(model.config, TRACED_BATCH)
    return torch.export.export(model, (clips,), dynamic_shapes=({0: Dim("batch", min=1)},))


def write_program(source: ExportSource, path: Path) -> float:
    """Write a `.pt2` file for the CPU; returns the largest difference of a logit.

    Raises RunError if the logits differ too much; the caller deletes the file.
    """
    description = json.dumps(describe_model(source), ensure_ascii=False)
    torch.export.save(trace(source.weights.model), path, extra_files={DESCRIPTION: description})
    program = torch.export.load(path).module()
    return check_agreement(source.weights.model, program, "exported program")

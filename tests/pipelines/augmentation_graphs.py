"""Runs the augmentation graph on given frames and numbers, without a loader."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from pipelines.augment.dali_nodes import apply_operations
from pipelines.augment.rand_augment import DrawnOperation
from pipelines.augment.roi import PARAMETER_COUNT, Box, RoiOperations, operation_parameters

CPU = torch.device("cpu")


def run(
    graph: Callable[..., Any],
    clips: Sequence[np.ndarray],
    *numbers: Sequence[np.ndarray],
    device: torch.device = CPU,
) -> list[np.ndarray]:
    """Run `graph(frames, *numbers)` on one batch: clips of F H W 3, and per clip one array of each kind.

    device: of the frames.
    """
    given = [list(clips), *(list(arrays) for arrays in numbers)]

    @pipeline_def(batch_size=len(clips), num_threads=1, device_id=device.index, enable_conditionals=True)
    def pipeline() -> Any:
        frames, *others = fn.external_source(
            source=lambda: given, num_outputs=len(given), layout=["FHWC", *[""] * len(numbers)]
        )
        return graph(frames.gpu() if device.type == "cuda" else frames, *others)

    built = pipeline()
    built.build()
    result = built.run()[0].as_cpu()
    return [np.array(result[place]) for place in range(len(clips))]


def operated(
    clips: Sequence[np.ndarray], laid_out: Sequence[RoiOperations], device: torch.device = CPU
) -> list[np.ndarray]:
    """What the operations make of the windows of full clips."""
    windows = [
        np.ascontiguousarray(clip[:, box.top : box.bottom, box.left : box.right])
        for clip, box in zip(clips, (each.roi for each in laid_out), strict=True)
    ]
    count = len(laid_out[0].parameters)

    def graph(frames: Any, parameters: Any) -> Any:
        return apply_operations(frames, parameters, count)

    return run(graph, windows, [each.parameters for each in laid_out], device=device)


def on_full_frames(drawn: Sequence[DrawnOperation], height: int, width: int, count: int) -> RoiOperations:
    """The same operations with nothing left out: each takes and gives the full frame."""
    full = Box(0, 0, height, width)
    parameters = np.zeros((count, PARAMETER_COUNT), np.float32)
    for place, each in enumerate(drawn):
        parameters[place] = operation_parameters(each, full, full, height, width)
    return RoiOperations(full, parameters)

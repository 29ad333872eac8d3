"""The cost of each operation on one CPU thread: on full frames, on the ROI of a crop, and in timm.

`python -m tests.pipelines.augmentation_costs` prints the tables of docs/augmentation.md.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def
from PIL import Image

from pipelines.augment.dali_nodes import apply_operations, augment_clip
from pipelines.augment.params import TrainClipSpec, draw_clip_params, inception_crop
from pipelines.augment.rand_augment import OPERATION_FACTORIES
from pipelines.augment.roi import RoiOperations, restrict_to_roi
from tests.pipelines.augmentation_graphs import on_full_frames
from tests.pipelines.augmentation_parity import by_timm, frame

FRAMES, HEIGHT, WIDTH = 8, 256, 340
BATCH = 16
MAGNITUDE = 7
RUNS = 7
WHOLE_CLIPS = {
    "crop": TrainClipSpec(FRAMES, 224),
    "crop and jitter": TrainClipSpec(FRAMES, 224, color_jitter=0.4),
    "RandAugment with p0, crop": TrainClipSpec(FRAMES, 224, rand_augment="rand-m7-n4-mstd0.5-inc1-p0"),
    "RandAugment, crop": TrainClipSpec(FRAMES, 224, rand_augment="rand-m7-n4-mstd0.5-inc1"),
}


def clip(name: str) -> np.ndarray:
    """Eight frames of 340x256, each moved by a few pixels."""
    pixels = np.asarray(Image.fromarray(frame(name)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return np.stack([np.roll(pixels, 5 * number, axis=1) for number in range(FRAMES)])


def fastest(work: Callable[[], Any]) -> float:
    """Least CPU time of several runs, in ms."""
    taken = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return 1000 * min(taken[1:])


def cost(graph: Callable[..., Any], clips: Sequence[np.ndarray], *numbers: Sequence[np.ndarray]) -> float:
    """CPU ms a clip for a batch through `graph(frames, *numbers)`."""
    given = [list(clips), *(list(arrays) for arrays in numbers)]

    @pipeline_def(
        batch_size=len(clips), num_threads=1, device_id=None, prefetch_queue_depth=1, enable_conditionals=True
    )
    def pipeline() -> Any:
        outputs = fn.external_source(
            source=lambda: given, num_outputs=len(given), layout=["FHWC", *[""] * len(numbers)]
        )
        return graph(*outputs)

    built = pipeline()
    built.build()
    return fastest(built.run) / len(clips)


def cost_of(laid_out: Sequence[RoiOperations], frames: np.ndarray) -> float:
    windows = [
        np.ascontiguousarray(frames[:, box.top : box.bottom, box.left : box.right])
        for box in (each.roi for each in laid_out)
    ]

    def graph(frames: Any, parameters: Any) -> Any:
        return apply_operations(frames, parameters, 1)

    return cost(graph, windows, [each.parameters for each in laid_out])


def operations() -> None:
    rng = np.random.default_rng(0)
    crops = [inception_crop(rng, HEIGHT, WIDTH, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(BATCH)]
    print("| operation | timm on PIL images | full frames | ROI of a random crop |\n|---|---|---|---|")
    for name, make in OPERATION_FACTORIES.items():
        frames, drawn = clip(name), [make(MAGNITUDE / 10, 1, HEIGHT, WIDTH)]
        timm = fastest(
            lambda frames=frames, name=name: [by_timm(name, MAGNITUDE, 1, each) for each in frames]
        )
        full = cost_of([on_full_frames(drawn, HEIGHT, WIDTH, 1)] * BATCH, frames)
        window = cost_of([restrict_to_roi(drawn, crop, HEIGHT, WIDTH, 1) for crop in crops], frames)
        print(f"| {name} | {timm:.1f} | {full:.1f} | {window:.1f} |", flush=True)


def whole_clips() -> None:
    frames = clip("Invert")
    print("\n| whole clip to 224 x 224, normalised | ms |\n|---|---|")
    for name, spec in WHOLE_CLIPS.items():
        draws = [
            draw_clip_params(
                spec, seed=0, epoch=0, sample=sample, repeat=0, frames=99, height=HEIGHT, width=WIDTH
            )
            for sample in range(4 * BATCH)
        ]
        windows = [
            np.ascontiguousarray(frames[:, top:bottom, left:right])
            for top, left, bottom, right in (each.roi for each in draws)
        ]

        def graph(
            frames: Any,
            *arrays: Any,
            spec: TrainClipSpec = spec,
            names: Sequence[str] = tuple(draws[0].arrays),
        ) -> Any:
            named = {name: arrays[index] for index, name in enumerate(names)}
            return augment_clip(frames, named, spec, (0.45,) * 3, (0.225,) * 3)

        taken = cost(graph, windows, *zip(*(each.arrays.values() for each in draws), strict=True))
        print(f"| {name} | {taken:.1f} |", flush=True)


if __name__ == "__main__":
    operations()
    whole_clips()

"""What a server answers of one video: likely classes, a timeline, and what the model looks at."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.dataset.video_list import probe_row
from pipelines.errors import VideoError
from trainer.inference.model_source import open_model
from trainer.inference.predictor import Predictor, choose_device
from trainer.inspection.contact_sheet import png_bytes
from trainer.inspection.explanation import Explainer
from trainer.inspection.explanation_pictures import explanation_sheet

_SHORTEST_WINDOW = 2.0  # seconds
_MOST_WINDOWS = 20


@dataclass(frozen=True)
class VideoRequest:
    """About a video. top: classes to name. attention: whether a picture of it is wanted."""

    path: Path
    top: int
    attention: bool


@dataclass(frozen=True)
class VideoModel:
    """Where the model comes from, as `open_model` takes it, and its device; makes the work of a process."""

    source: Path
    device: str
    last: bool = False
    frames: int | None = None
    class_names: tuple[str, ...] | None = None

    def __call__(self) -> tuple[dict[str, Any], Callable[[VideoRequest], dict[str, Any]]]:
        device = choose_device(self.device)
        weights = open_model(self.source, last=self.last, frames=self.frames, class_names=self.class_names)
        predictor, explainer = Predictor(weights, device), Explainer(weights, device)
        about = {"classes": len(predictor.class_names), "device": str(device)}
        return about, lambda question: answer_request(predictor, explainer, question)


def answer_request(predictor: Predictor, explainer: Explainer, question: VideoRequest) -> dict[str, Any]:
    """As JSON; `error` alone, in words that follow the video's name, where the video cannot be used."""
    path = question.path
    try:
        row = probe_row(path)
    except VideoError as defect:
        return {"error": str(defect)}
    (found,) = predictor.stream([path], top=question.top)
    if found.error:
        return {"error": found.error}
    duration = row.frames / row.fps if row.fps else 0.0
    window = max(_SHORTEST_WINDOW, duration / _MOST_WINDOWS)
    timeline = predictor.timeline(path, window=window, top=1)
    said: dict[str, Any] = {
        "video": {"width": row.width, "height": row.height, "frames": row.frames, "seconds": duration},
        "top": [{"class": name, "probability": probability} for name, probability in found.top],
        "timeline": [
            {"start": each.start, "end": each.end, "class": each.top[0][0], "probability": each.top[0][1]}
            for each in timeline.windows
        ],
    }
    if timeline.error:
        said["timeline_error"] = timeline.error
    if question.attention:
        sheet = explanation_sheet(explainer.explain(path), names_video=False)
        said["attention_png"] = base64.b64encode(png_bytes(sheet)).decode()
    return said

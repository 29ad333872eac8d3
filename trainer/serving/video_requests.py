"""The server's response for one video: likely classes, a timeline, and a picture of the attention."""

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
    """A request for one video.

    path: the video.
    top: number of classes.
    attention: whether to draw the attention.
    """

    path: Path
    top: int
    attention: bool


@dataclass(frozen=True)
class VideoModel:
    """Loads the model in the inference process; arguments as for `open_model`, and the device."""

    source: Path
    device: str
    last: bool = False
    frames: int | None = None
    class_names: tuple[str, ...] | None = None

    def __call__(self) -> tuple[dict[str, Any], Callable[[VideoRequest], dict[str, Any]]]:
        device = choose_device(self.device)
        weights = open_model(self.source, last=self.last, frames=self.frames, class_names=self.class_names)
        predictor, explainer = Predictor(weights, device), Explainer(weights, device)
        description = {"classes": len(predictor.class_names), "device": str(device)}
        return description, lambda request: answer_request(predictor, explainer, request)


def answer_request(predictor: Predictor, explainer: Explainer, request: VideoRequest) -> dict[str, Any]:
    """The response as JSON values; only `error`, as text that follows the video's name, if it is unusable."""
    path = request.path
    try:
        row = probe_row(path)
    except VideoError as defect:
        return {"error": str(defect)}
    (found,) = predictor.stream([path], top=request.top)
    if found.error:
        return {"error": found.error}
    duration = row.frames / row.fps if row.fps else 0.0
    window = max(_SHORTEST_WINDOW, duration / _MOST_WINDOWS)
    timeline = predictor.timeline(path, window=window, top=1)
    response: dict[str, Any] = {
        "video": {"width": row.width, "height": row.height, "frames": row.frames, "seconds": duration},
        "top": [{"class": name, "probability": probability} for name, probability in found.top],
        "timeline": [
            {"start": each.start, "end": each.end, "class": each.top[0][0], "probability": each.top[0][1]}
            for each in timeline.windows
        ],
    }
    if timeline.error:
        response["timeline_error"] = timeline.error
    if request.attention:
        sheet = explanation_sheet(explainer.explain(path), names_video=False)
        response["attention_png"] = base64.b64encode(png_bytes(sheet)).decode()
    return response

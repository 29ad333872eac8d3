"""A folder for the Hugging Face Hub: configuration, weights, preprocessing and a model card.

The library `transformers` lacks the architecture; `uniformerv2.load(FOLDER)` loads the folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

from trainer.checkpoint.weights import save_weights
from trainer.export.export_source import ExportSource
from trainer.export.model_card import model_card
from trainer.export.numeric_check import check_agreement
from trainer.export.public_metadata import public_recipe
from trainer.inference.model_source import HUB_WEIGHTS, open_model
from trainer.system.files import write_json, write_text


def write_hub_folder(source: ExportSource, path: Path) -> float:
    """Write the folder, load it again and return the largest difference of a logit.

    Raises RunError if the logits differ too much or a file cannot be written; the caller deletes the files.
    """
    path.mkdir()
    weights = source.weights
    description = {
        "model": dataclasses.asdict(weights.model.config),
        "class_names": list(weights.class_names),
        "preprocessing": weights.preprocessing,
        "recipe": public_recipe(weights.recipe),
    }
    save_weights(path / HUB_WEIGHTS, weights.model.state_dict(), description)
    write_json(path / "config.json", hub_config(source))
    write_json(path / "preprocessor_config.json", hub_preprocessing(weights.preprocessing))
    write_text(path / "README.md", model_card(source))
    return check_agreement(weights.model, open_model(path).model, "folder")


def hub_config(source: ExportSource) -> dict[str, Any]:
    """`config.json`: the fields of the model, and the classes under the Hub's field names."""
    names = source.weights.class_names
    return {
        "architectures": ["UniFormerV2"],
        "model_type": "uniformerv2",
        "library_name": "uniformerv2-trainer",
        **dataclasses.asdict(source.weights.model.config),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def hub_preprocessing(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """`preprocessor_config.json`, with the field names of the Hub's video processors.

    The short side is resized to the model's resolution, bilinear without antialiasing. The centre square is
    cropped. Values 0..255 are divided by 255 and normalised with mean and standard deviation of R, G and B.
    The field `uniformerv2` has the full description, including the choice of frames.
    """
    side = preprocessing["resolution"]
    return {
        "video_processor_type": "UniFormerV2VideoProcessor",
        "num_frames": preprocessing["frames"],
        "frame_sampling": preprocessing["sampling"],
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 2,  # PIL's number for bilinear
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
        "data_format": "channels, frames, rows, columns",
        "uniformerv2": preprocessing,
    }

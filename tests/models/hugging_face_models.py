"""Writes `data/hugging_face.json`: tensor names and class tokens of small image models of transformers.

    python -m tests.models.hugging_face_models

The weights and images are a function of names and shapes, so the file holds only names, shapes and outputs.
transformers is no dependency of this project: install it to write the file again. Written with transformers
4.57.6 and torch 2.14.1.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).parent / "data" / "hugging_face.json"
SIZE = {"image_size": 32, "patch_size": 8}
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """The values of a tensor: normal, of a scale at which every tensor matters for the result."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2 and name.endswith("weight"):
        return torch.from_numpy(drawn / np.sqrt(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(0.5 + 0.5 * drawn, dtype=np.float32))


def images() -> Tensor:
    """Two images of 32 x 32 pixels."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32))


def _models() -> Iterator[tuple[str, Any, Any]]:
    """Name, whole model, and the image tower in it."""
    import transformers as hf

    clip = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SIZE, **WIDTH, projection_dim=8))
    yield "clip", clip, clip.vision_model
    vit = hf.ViTForImageClassification(hf.ViTConfig(**SIZE, **WIDTH))
    yield "supervised", vit, vit.vit
    small = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    mae = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SIZE, **WIDTH, **small, mask_ratio=0.0))
    yield "mae", mae, mae.vit
    tuned = hf.BeitConfig(**SIZE, **WIDTH, use_relative_position_bias=True, use_mask_token=False)
    beit = hf.BeitForImageClassification(tuned)
    yield "beit", beit, beit.beit
    pretrained = hf.BeitConfig(**SIZE, **WIDTH, use_shared_relative_position_bias=True, use_mask_token=True)
    shared = hf.BeitForMaskedImageModeling(pretrained)
    yield "beit, shared positions", shared, shared.beit


def main() -> None:
    found = {}
    for name, whole, tower in _models():
        state = whole.state_dict()
        with torch.no_grad():
            for key, tensor in state.items():
                if tensor.is_floating_point():
                    tensor.copy_(numbers(key, tuple(tensor.shape)))
            tokens = tower.eval()(images(), output_hidden_states=True).hidden_states[-1][:, 0]
        floats = {key: list(value.shape) for key, value in state.items() if value.is_floating_point()}
        found[name] = {"tensors": floats, "class_tokens": tokens.tolist()}
    text = json.dumps(found, indent=1)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

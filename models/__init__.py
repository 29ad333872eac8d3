"""Clips to logits: UniFormerV2 in PyTorch."""

from models.config import FORMS, PRESETS, ModelError, UniFormerV2Config, build_config
from models.uniformerv2 import UniFormerV2, create_model

__all__ = [
    "FORMS",
    "PRESETS",
    "ModelError",
    "UniFormerV2",
    "UniFormerV2Config",
    "build_config",
    "create_model",
]

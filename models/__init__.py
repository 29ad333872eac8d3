"""Clips to logits: UniFormerV2 in PyTorch."""

from typing import TYPE_CHECKING, Any

from models.config import FORMS, PRESETS, ModelError, UniFormerV2Config, build_config

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """The model itself when it is first asked for: PyTorch takes seconds, and a wrong recipe needs none."""
    if name in ("UniFormerV2", "create_model"):
        from models import uniformerv2

        return getattr(uniformerv2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

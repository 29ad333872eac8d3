"""UniFormerV2 (arXiv 2211.09552) in PyTorch: clips to logits."""

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
    """Import the model on first use: PyTorch takes seconds to import, and checking a recipe needs only the
    config."""
    if name in ("UniFormerV2", "create_model"):
        from models import uniformerv2

        return getattr(uniformerv2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

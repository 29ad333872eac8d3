"""UniFormerV2 (arXiv 2211.09552) in PyTorch: clips to logits."""

import os
import sys
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

# For NumPy's OpenBLAS, which computes products on some CPUs (`models.products`) and reads this when NumPy is
# loaded: its threads sleep 2^4 cycles after a product. Otherwise they wait actively for 2^26.
if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def __getattr__(name: str) -> Any:
    """Import the model on first use: PyTorch takes seconds to import, and checking a recipe needs only the
    config."""
    if name in ("UniFormerV2", "create_model"):
        from models import uniformerv2

        return getattr(uniformerv2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

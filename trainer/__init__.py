"""Trains, evaluates and exports models by recipes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.inference.predictor import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use, because its dependencies take seconds to import."""
    if name == "load":
        from trainer.inference.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

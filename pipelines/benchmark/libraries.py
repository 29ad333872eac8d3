"""Optional libraries of the baseline loaders."""

from importlib import import_module


class LibraryUnavailable(Exception):
    """A baseline loader's library is missing or cannot be loaded; the message gives the reason."""


def require_library(module: str, distribution: str) -> None:
    """Import `module` of the package `distribution`; raises LibraryUnavailable where that fails."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise LibraryUnavailable(
            f"{distribution} is not installed; run `make bench`, or `pip install --no-deps {distribution}`"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec needs FFmpeg's shared libraries on the system and a version that matches torch.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LibraryUnavailable(f"{distribution} is installed, but cannot be loaded: {reason}") from error

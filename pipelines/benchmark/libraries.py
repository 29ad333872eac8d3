"""What the rivals are made of: libraries that this project itself does without, and that may be missing."""

from importlib import import_module


class LibraryUnavailable(Exception):
    """A rival's library is missing or cannot be loaded; the message says why."""


def require_library(module: str, distribution: str) -> None:
    """Load `module`, which comes with the installable `distribution`.

    Raises NotInstalled unless it is there and can be loaded.
    """
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise LibraryUnavailable(
            f"{distribution} is not installed; run `make bench`, or `pip install --no-deps {distribution}`"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec needs FFmpeg's shared libraries from the system, and a version that matches torch.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LibraryUnavailable(f"{distribution} is installed, but cannot be loaded: {reason}") from error

"""A console for a terminal or a pipe."""

from rich.console import Console


class PipeConsole(Console):
    """Raises BrokenPipeError as `print` does; rich would end the process with code 1."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError

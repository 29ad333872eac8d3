"""The parts of `launch/compare.py`: reads the runs, writes the report, saves it in MLflow."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.worker_pool import Progress
from trainer.errors import RunError
from trainer.system.files import write_bytes, write_text
from trainer.tracking.comparison.compare import Comparison
from trainer.tracking.comparison.folder_source import find_compared_runs, read_folder
from trainer.tracking.comparison.mlflow_source import MlflowSource, is_run_id
from trainer.tracking.comparison.render import Block, as_html, as_markdown, picture_of
from trainer.tracking.comparison.report import as_json
from trainer.tracking.comparison.runs import ComparedRun

FORMATS = (".html", ".md")
PARENT = "parent"
_ARTIFACTS = "comparison"  # folder among a run's artifacts

Connect = Callable[[], MlflowSource]


@dataclass
class RunReader:
    """Reads the runs that the command names, each once."""

    runs: Sequence[str]
    """Folders and MLflow's ids of runs."""
    experiment: str | None
    """MLflow's name of an experiment."""
    filter_string: str | None
    """A filter of runs in MLflow's language."""
    uri: str | None
    """MLflow's address."""
    baseline: str | None
    """Like one of `runs`; it may be among them."""
    _mlflow: MlflowSource | None = None

    def connect(self) -> MlflowSource:
        """The connection to MLflow, opened at the first call. Raises as `MlflowSource`."""
        if self._mlflow is None:
            self._mlflow = MlflowSource(self.uri)
        return self._mlflow

    def close(self) -> None:
        if self._mlflow is not None:
            self._mlflow.close()

    def read(self, progress: Progress) -> tuple[list[ComparedRun], str | None]:
        """All these runs, and the source of the baseline, None where none is named.

        Raises RunError where a named run does not exist, StartAgain where MLflow does not answer.
        """
        named = [*self.runs, *([] if self.baseline is None else [self.baseline])]
        ids = list(dict.fromkeys(text for text in named if is_run_id(text) and not Path(text).exists()))
        paths = [Path(text) for text in dict.fromkeys(named) if text not in ids]
        folders: dict[Path, Path] = {}  # by resolved path: one may be named twice
        for path in paths:
            for folder in find_compared_runs(path):
                folders.setdefault(folder.resolve(), folder)
        found = {}
        for number, (real, folder) in enumerate(folders.items(), start=1):
            found[str(real)] = read_folder(folder)
            progress(number, len(folders))
        if self.experiment is not None or self.filter_string is not None:
            source, text = self.connect(), self.filter_string or ""
            for run in source.search(self.experiment, text, progress):
                found[run.source] = run
        missing = [run_id for run_id in ids if run_id not in found]
        if missing:
            found |= {run.source: run for run in self.connect().runs(missing)}
        return list(found.values()), self._baseline(found)

    def _baseline(self, found: dict[str, ComparedRun]) -> str | None:
        text = self.baseline
        if text is None:
            return None
        if text in found:
            return found[text].source
        folders = find_compared_runs(Path(text))
        if len(folders) > 1:
            raise RunError(f"--baseline {text} holds {len(folders)} runs; name one of them")
        return found[str(folders[0].resolve())].source


def check_output(path: Path) -> None:
    """Raises RunError for a path at which no report can be written."""
    if path.suffix not in FORMATS:
        raise RunError(f"--out {path}: the format is that of the ending, one of {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise RunError(f"--out {path}: there is no folder {path.absolute().parent}")


def write_report(blocks: Sequence[Block], path: Path) -> list[Path]:
    """Write the report in the format of the suffix, Markdown with its picture beside it.

    Returns the files that were written. Raises RunError where one cannot be written.
    """
    picture = picture_of(blocks)
    beside = path.with_suffix(".curves.png")
    written = [path]
    try:
        if path.suffix == ".html":
            write_text(path, as_html(blocks))
        else:
            if picture is not None:
                write_bytes(beside, picture.png)
                written.append(beside)
            write_text(path, as_markdown(blocks, beside.name))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
    return written


def save_to_mlflow(comparison: Comparison, blocks: Sequence[Block], run: str, connect: Connect) -> str:
    """Save the report, its picture and the JSON as artifacts of an MLflow run; returns the run's id.

    run: its id, or `parent` for the parent of all compared runs. Raises as `MlflowSource.save`, and RunError
    where the compared runs have no parent, or several.
    """
    if run == PARENT:
        parents = {each.parent for each in comparison.runs}
        if len(parents) != 1 or None in parents:
            raise RunError("--log-to parent: the runs do not all have the same parent run; give its id")
        run = str(parents.pop())
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        files = [
            *write_report(blocks, Path(folder) / "comparison.html"),
            *write_report(blocks, Path(folder) / "comparison.md"),
            Path(folder) / "comparison.json",
        ]
        write_text(files[-1], as_json(comparison) + "\n")
        connect().save(run, files, _ARTIFACTS)
    return run

"""Detects the format of a table: separator, header, and the columns with path, label and weight."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.video_extensions import EXTENSIONS, STILL_IMAGES, extension
from pipelines.errors import DataError
from pipelines.formatting import printable

PATH_NAMES = (
    "path", "paths", "video_path", "videopath", "path_to_video", "filepath", "file_path", "full_path",
    "fullpath", "abs_path", "absolute_path", "rel_path", "relpath", "relative_path", "clip_path",
    "media_path", "source_path", "filename", "file_name", "video_file", "video_filename",
    "video_file_name", "video_name", "videoname", "clip_name", "clip_file", "file", "files", "video",
    "videos", "clip", "clips", "fname", "filenames", "media", "location", "source", "src", "vid",
)  # fmt: skip
"""Headers of the column with the files, the most likely first."""

_WEAK_PATH_NAMES = (
    "name", "names", "id", "uid", "key", "video_id", "videoid", "vid_id", "clip_id", "uri", "url", "link",
)  # fmt: skip
"""Headers of a column with files or something else: used if its first value is a file."""

LABEL_NAMES = (
    "label", "labels", "class", "class_name", "classname", "class_label", "label_name", "labelname",
    "category", "category_name", "action", "action_name", "action_label", "action_class", "activity",
    "activity_name", "activity_label", "target", "target_name", "targets", "gt", "ground_truth",
    "groundtruth", "annotation", "tag", "y", "classes", "class_id", "classid", "class_idx",
    "class_index", "class_num", "class_number", "label_id", "labelid", "label_idx", "label_index",
    "label_num", "label_number", "category_id", "action_id", "activity_id", "target_id", "template",
    "verb", "verb_class", "gesture", "emotion", "sign", "gloss", "sport", "genre", "event",
)  # fmt: skip
"""Headers of the column with the classes, the most likely first."""

WEIGHT_NAMES = ("weight", "weights", "sample_weight", "sampling_weight", "sample_weights")

SPLIT_NAMES = ("split", "subset", "set", "partition", "fold", "phase", "usage")

_INDEX_NAMES = re.compile(r"|unnamed_?:?_?\d+|index|idx|row|no|nr|#|level_0")

_SEPARATORS = "\t,;|"

_OPENS = re.compile(r'(^|[,;|\t])\s*"')  # the beginning of a quoted field
_MAX_JOINED = 5  # lines of a quoted field that are joined to detect the format

FRAMES = re.compile(r"(\S.*?)\s+(\d+)\s+(\S+)")
"""A line of path, number of frames and label, as in lists of extracted frames."""


Columns = tuple[str | None, str | None, str | None]
"""The columns with path, label and weight as the user gives them: header names, or numbers from 1."""


@dataclass(slots=True)
class TableFormat:
    """How to split the lines of a table, and which field is which."""

    separator: str | None
    """None: blanks. Blanks inside the path stay in the path."""
    fields: int = 2
    path: int = 0
    label: int = 1
    weight: int | None = None
    split: int | None = None
    header: list[str] = field(default_factory=list)
    """The fields of the header; empty if there is none."""
    header_line: int = 0
    """The line number of the header; 0 if there is none."""

    @property
    def used(self) -> dict[str, int]:
        """The columns that every line must fill, with their names for messages."""
        weight = {} if self.weight is None else {"a weight": self.weight}
        return {"a path": self.path, "a label": self.label, **weight}

    def split_line(self, line: str) -> list[str]:
        """The fields of a line without a line break inside quotes."""
        if self.separator is not None:
            return split_with(self.separator, line)
        if '"' in line and len(quoted := split_with(" ", line)) == self.fields:
            return quoted
        by_tab = [part.strip() for part in line.split("\t")]
        if len(by_tab) == self.fields:
            return by_tab
        before = line.split(maxsplit=self.path)
        if len(before) <= self.path:
            return before
        after = before.pop().strip().rsplit(maxsplit=self.fields - 1 - self.path)
        return [unquote(part) for part in before + after]


def split_with(separator: str, line: str) -> list[str]:
    """The fields of a line; the whole line if csv cannot parse it."""
    try:
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
        return [field.strip() for field in fields]
    except csv.Error:
        return [line]


def unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def is_file(root: Path, name: str) -> bool:
    try:
        return bool(name) and (root / name).is_file()
    except (OSError, ValueError):
        return False


def looks_like_file(name: str) -> bool:
    """Whether the name has the extension of a video or an image."""
    ending = extension(re.split(r"[/\\]", unquote(name.strip("'")))[-1])
    return ending in EXTENSIONS or ending in STILL_IMAGES


def _may_be_file(root: Path, name: str) -> bool:
    return looks_like_file(name) or is_file(root, name)


def detect_format(
    table: Path, sample: Sequence[tuple[int, str]], root: Path, columns: Columns, findings: Findings
) -> TableFormat:
    """Detect the format of a table from its first lines, given with their numbers.

    Raises:
        DataError: it is not clear which columns have path and label.
    """
    return _FormatDetector(table, sample, root, columns, findings).format


class _FormatDetector:
    """The lines that the format is detected from, and what is known of it so far."""

    def __init__(
        self, table: Path, sample: Sequence[tuple[int, str]], root: Path, columns: Columns, findings: Findings
    ) -> None:
        self._root = root
        self._findings = findings
        self._place = f"{printable(table)}, line {sample[0][0]}"
        self._lines = [line.rstrip("\r\n") for _, line in sample]
        separator = _separator(self._lines, root)
        self.format = TableFormat(separator)
        if separator is None:
            rows = [[unquote(part) for part in line.split()] for line in self._lines]
        else:
            rows = [split_with(separator, line) for line in self._lines]
        self._first, self._rows = rows[0], rows[1:]
        names = [_plain(cell) for cell in self._first]
        if any(columns) or self._is_header(names):
            self._from_header(names, columns, sample[0][0])
        elif separator is None:
            self._from_blanks()
        else:
            self._from_fields()

    # with a header

    def _is_header(self, names: list[str]) -> bool:
        """Whether the first line is a header; `names` are its normalised fields."""
        if len(names) < 2 or any(_may_be_file(self._root, cell) for cell in self._first):
            return False
        path = any(name in PATH_NAMES for name in names)
        label = any(name in LABEL_NAMES for name in names)
        if (path or any(map(_is_weak, names))) and label:
            return True
        # Unusual headers: the first line has no file, and most of the others have one.
        if self.format.separator is None and not (path or label):
            return False
        rows = [row for row in self._rows if len(row) == len(names)]
        with_file = [row for row in rows if any(looks_like_file(cell) for cell in row)]
        if not with_file or len(with_file) * 2 < len(rows):
            return False
        # A cell that occurs again below is a value, not a header.
        return not any(cell and cell in row for cell in self._first for row in rows)

    def _from_header(self, names: list[str], columns: Columns, number: int) -> None:
        form = self.format
        form.fields = len(names)
        has_header = self._is_header(names) or any(
            option is not None and not option.isdigit() and _plain(option) in names for option in columns
        )
        form.header_line, form.header = (number, self._first) if has_header else (0, [])
        path, label, form.weight = (self._named(option, names, has_header) for option in columns)
        if has_header:
            form.weight = _first_of(WEIGHT_NAMES, names) if form.weight is None else form.weight
            form.split = _first_of(SPLIT_NAMES, names)
            path = self._path_column(names) if path is None else path
            label = _first_of(LABEL_NAMES, names, path) if label is None else label
        taken = {path, label, form.weight, form.split}
        free = [i for i, name in enumerate(names) if i not in taken and not _INDEX_NAMES.fullmatch(name)]
        if path is None and any(map(_is_weak, names)):
            pass  # an identifier that is not a file: the remaining column need not be the path
        elif (path is None) != (label is None) and len(free) == 1:
            path = free[0] if path is None else path
            label = free[0] if label is None else label
            if has_header:
                self._note_header(number, path, label)
        elif path is None and label is None and len(free) == 2:
            path, label = self._two_columns(free, number)
        if path is None or label is None:
            raise self._unclear(path is None, label is None)
        form.path, form.label = path, label
        ignored = [
            printable(self._first[i])
            for i, name in enumerate(names)
            if i not in form.used.values() and not _INDEX_NAMES.fullmatch(name)
        ]
        if has_header and ignored:
            used = printable(self._first[path]), printable(self._first[label])
            self._findings.note(
                f"Columns in use: {used[0]} (path) and {used[1]} (label). Ignored: {', '.join(ignored)}."
            )

    def _path_column(self, names: list[str]) -> int | None:
        """The column whose header names files; if several do, one whose first value is a file."""
        first = self._rows[0] if self._rows else []
        candidates = [names.index(name) for name in PATH_NAMES if name in names]
        for i in [*candidates, *(i for i, name in enumerate(names) if _is_weak(name))]:
            if i < len(first) and _may_be_file(self._root, first[i]):
                return i
        return candidates[0] if candidates else None

    def _two_columns(self, free: list[int], number: int) -> tuple[int, int]:
        """Path and label of two columns with unusual headers: the path looks more like a file."""
        rows = [row for row in self._rows if len(row) == len(self._first)]
        path, label = free
        if _share(rows, label, looks_like_file) > _share(rows, path, looks_like_file):
            path, label = label, path
        self._note_header(number, path, label)
        return path, label

    def _note_header(self, number: int, path: int, label: int) -> None:
        names = printable(self._first[path]), printable(self._first[label])
        self._findings.note(
            f"Line {number} is read as a header: '{names[0]}' is the path, '{names[1]}' the label."
        )

    def _named(self, option: str | None, names: list[str], has_header: bool) -> int | None:
        """The index of a column that the user gives by name or by number from 1."""
        if option is None:
            return None
        if has_header and _plain(option) in names:
            return names.index(_plain(option))
        if option.isascii() and option.isdigit() and 1 <= int(option) <= len(names):
            return int(option) - 1
        raise DataError(
            f"{self._place}: no column '{printable(option)}'; there are {len(names)}: {self._columns()}. "
            "Give a name of the header, or a number from 1"
        )

    def _unclear(self, path: bool, label: bool) -> DataError:
        missing = ["path"] * path + ["label"] * label
        return DataError(
            f"{self._place}: it is not clear which of the columns {self._columns()} has the "
            f"{' and which the '.join(missing)}; give {' and '.join(f'--{name}-column' for name in missing)}"
        )

    def _columns(self) -> str:
        return ", ".join(f"'{printable(cell)}'" for cell in self._first)

    # without a header

    def _from_fields(self) -> None:
        form = self.format
        form.fields = len(self._first)
        while form.fields > 2 and not self._first[form.fields - 1]:
            form.fields -= 1  # spreadsheets write commas at the end of lines
        if form.fields == 2:
            self._find_swapped()
        elif form.fields == 3 and self._counts_up() and looks_like_file(self._first[1]):
            form.path, form.label = 1, 2
            self._findings.note("The first column counts the lines and is ignored.")
        else:
            form.fields = 2  # reading the first line raises the error

    def _from_blanks(self) -> None:
        frames = [FRAMES.fullmatch(line.strip()) for line in self._lines]
        matches = [match for match in frames if match]
        if len(matches) == len(frames):
            path = self._root / matches[0][1]
            if path.is_dir() and not is_file(self._root, f"{matches[0][1]} {matches[0][2]}"):
                raise DataError(
                    f"{self._place}: {printable(path)} is a folder: folders of images (path, frames, label) "
                    "are not supported; give a list of video files"
                )
            if all(_may_be_file(self._root, match[1]) for match in matches) and not any(
                is_file(self._root, f"{match[1]} {match[2]}") for match in matches
            ):
                self.format.fields, self.format.label = 3, 2
                self._findings.note(
                    "The lines are read as path, number of frames, label; the number of frames is ignored."
                )
                return
        self._find_swapped()

    def _find_swapped(self) -> None:
        """If the second field is the file and the first is not, the first is the label."""
        form = self.format
        form.path, form.label = 1, 0
        swapped = [form.split_line(line) for line in self._lines]
        form.path, form.label = 0, 1
        rows = [form.split_line(line) for line in self._lines]
        if _share(rows, 0, looks_like_file) == 0 and _share(swapped, 1, looks_like_file) > 0.5:
            if any(is_file(self._root, row[0]) for row in rows if row):
                return
            form.path, form.label = 1, 0
            self._findings.note("The lines are read as label, path: the second field is the file.")

    def _counts_up(self) -> bool:
        numbers = [row[0] for row in [self._first, *self._rows] if row]
        return all(n.isascii() and n.isdigit() for n in numbers) and len(set(numbers)) == len(numbers)


def _separator(lines: list[str], root: Path) -> str | None:
    """The character that splits the lines into the same number of fields; None for blanks."""
    best: tuple[float, int] | None = None
    chosen = None
    for order, separator in enumerate(_SEPARATORS):
        if separator not in lines[0]:
            continue
        rows = [split_with(separator, line) for line in lines]
        even = sum(len(row) == len(rows[0]) and len(row) > 1 for row in rows) / len(rows)
        if separator in ";|" and even < 0.9:
            continue  # part of file names
        header = {_plain(cell) for cell in rows[0]}
        known = bool(header & set(PATH_NAMES)) + bool(header & set(LABEL_NAMES))
        files = max(_share(rows, i, partial(_may_be_file, root)) for i in range(len(rows[0])))
        score = (known + even + files, -order)
        if best is None or score > best:
            best, chosen = score, separator
    return chosen


def _share(rows: Iterable[Sequence[str]], column: int, test: Callable[[str], bool]) -> float:
    cells = [row[column] for row in rows if len(row) > column]
    return sum(map(test, cells)) / len(cells) if cells else 0.0


def _is_weak(name: str) -> bool:
    return name in _WEAK_PATH_NAMES or (name.endswith("_id") and name not in LABEL_NAMES)


def _plain(header: str) -> str:
    return re.sub(r"[\s_\-./]+", "_", header.strip().strip("\"'").lower().lstrip("#").strip()).strip("_")


def _first_of(wanted: Sequence[str], names: list[str], taken: int | None = None) -> int | None:
    """The column with the first of the wanted names that occurs, other than the column `taken`."""
    return next((i for want in wanted for i, name in enumerate(names) if name == want and i != taken), None)


def join_quoted(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The lines, with the lines of a quoted field joined if it ends within `_MAX_JOINED` lines."""
    joined: list[tuple[int, str]] = []
    place = 0
    while place < len(lines):
        number, line = lines[place]
        end = place + 1
        if _OPENS.search(line) and line.count('"') % 2:
            text = line
            for later in range(end, min(end + _MAX_JOINED, len(lines))):
                text += lines[later][1]
                if text.count('"') % 2 == 0:
                    line, end = text, later + 1
                    break
        joined.append((number, line))
        place = end
    return joined


def csv_rows(lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the number of its first line.

    Raises:
        csv.Error: a quote is not closed, or text follows a closing quote; the message has the line.
    """
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    begin = 1
    try:
        for row in reader:
            yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        what = "a double quote is not closed; close or remove it" if "end of data" in str(error) else error
        raise csv.Error(f"line {begin}: {what}") from error


def names_columns(line: str) -> bool:
    """Whether a line, which may begin with `#`, has usual headers for path and label."""
    names = {_plain(cell) for cell in re.split(r"[\t,;|\s]+", line.lstrip("# \t"))}
    return bool(names & set(PATH_NAMES)) and bool(names & set(LABEL_NAMES))

"""Blocks of a report, printed to a terminal, as Markdown, and as one HTML file.

Names and values come from untrusted files: they are escaped, and no control character reaches a terminal.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote

from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pipelines.formatting import printable
from trainer.system.terminal import PipeConsole

_LEAST_NAME = 12  # characters of a run's name that are never cut
_LEAST_WRAPPED = 24  # characters of a column that wraps


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    best: bool = False
    """Whether it is the best of its column, or a heading."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    head: str
    numeric: bool = True
    """Aligned to the right."""
    expendable: int = 0
    """A terminal that is too narrow omits columns, the highest number first; never those with 0."""
    name: bool = False
    """A run's name, whose beginning may be cut."""
    wraps: bool = False
    """Whether a cell may take several lines."""


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    png: bytes
    text: str


Block = Heading | Paragraph | Table | Picture


def print_report(blocks: Sequence[Block], console: Console) -> None:
    """Print blocks: to a file or a pipe in lines of any length, to a terminal in tables that fit its
    width."""
    width = console.width if console.is_terminal else 10_000
    wide = PipeConsole(file=console.file, width=width, force_terminal=console.is_terminal, highlight=False)
    with wide.capture() as capture:
        for number, block in enumerate(blocks):
            if isinstance(block, Heading):
                wide.print(*[""] * (number > 0), Text(printable(block.text), style="bold"), sep="\n")
            elif isinstance(block, Paragraph):
                wide.print(Text(printable(block.text), style="dim"))
            elif isinstance(block, Table):
                table, left_out = _fitting(_printable(block), width)
                wide.print(_rich(table, width))
                if left_out:
                    wide.print(Text(f"No space for: {', '.join(left_out)}; --out shows all.", style="dim"))
    console.file.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())
    console.file.flush()


def _printable(table: Table) -> Table:
    columns = [replace(column, head=printable(column.head)) for column in table.columns]
    return Table(columns, [[replace(cell, text=printable(cell.text)) for cell in row] for row in table.rows])


def _fitting(table: Table, width: int) -> tuple[Table, list[str]]:
    """The table with shorter names, then without its expendable columns, until it fits; the omitted
    columns."""
    needed = _width(table)
    for number, column in enumerate(table.columns):
        if column.name and needed > width:
            most = max(_LEAST_NAME, _unique_width([row[number].text for row in table.rows]))
            rows = [
                [replace(cell, text=_end_of(cell.text, most)) if index == number else cell
                 for index, cell in enumerate(row)]
                for row in table.rows
            ]  # fmt: skip
            table = Table(table.columns, rows)
            needed = _width(table)
    left_out = []
    while _width(table) > width:
        number, column = max(enumerate(table.columns), key=lambda item: item[1].expendable)
        if not column.expendable:
            break
        left_out.append(column.head)
        keep = [index for index in range(len(table.columns)) if index != number]
        table = Table(
            [table.columns[index] for index in keep], [[row[index] for index in keep] for row in table.rows]
        )
    return table, left_out


def _width(table: Table) -> int:
    """The least width of the table, with a blank between columns and heads on two lines."""
    return sum(_least_widths(table)) + len(table.columns) - 1


def _least_widths(table: Table) -> list[int]:
    widths = []
    for number, column in enumerate(table.columns):
        head = max(map(len, column.head.split(" "))) if column.numeric else len(column.head)
        cells = max((len(row[number].text) for row in table.rows), default=0)
        widths.append(min(max(head, cells), _LEAST_WRAPPED) if column.wraps else max(head, cells))
    return widths


def _unique_width(names: Sequence[str]) -> int:
    """The least width to which distinct names may be cut and stay distinct."""
    longest = max(map(len, names), default=0)
    distinct = len(set(names))
    widths = range(_LEAST_NAME, longest)
    return next((width for width in widths if len({_end_of(n, width) for n in names}) == distinct), longest)


def _end_of(name: str, width: int) -> str:
    """The end of a name, where runs of a sweep differ."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _rich(table: Table, width: int) -> RichTable:
    """A table for rich, with heads on one line and two blanks between columns where the width allows."""
    widths = _least_widths(table)
    for number, column in enumerate(table.columns):
        more = len(column.head) - widths[number]
        if 0 < more <= width - sum(widths) - 2 * (len(widths) - 1):
            widths[number] += more
    while sum(widths) + len(widths) - 1 > width:
        number = max(range(len(widths)), key=lambda index: widths[index] * table.columns[index].wraps)
        if not table.columns[number].wraps or widths[number] <= _LEAST_NAME:
            break
        widths[number] -= 1
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    rich_table = RichTable(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for column, own in zip(table.columns, widths, strict=True):
        rich_table.add_column(
            Text(column.head),
            justify="right" if column.numeric else "left",
            overflow="fold",
            vertical="top",
            width=None if column.wraps else own,
            min_width=own if column.wraps else None,
        )
    for row in table.rows:
        rich_table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    return rich_table


def as_markdown(blocks: Sequence[Block], picture: str) -> str:
    """GitHub's Markdown. picture: name of the file beside it with the report's picture."""
    return _markdown(blocks, quote(picture))


def _markdown(blocks: Sequence[Block], picture: str) -> str:
    parts = ["# Comparison of runs"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {_escaped(block.text)}")
        elif isinstance(block, Paragraph):
            parts.append(_escaped(block.text))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        else:
            parts.append(f"## Curves\n\n{_escaped(block.text)}\n\n![curves]({picture})")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [line([_escaped(column.head) for column in table.columns])]
    rows.append(line(["---:" if column.numeric else "---" for column in table.columns]))
    rows += [line([_markdown_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(rows)


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text.strip())
    return f"**{text}**" if cell.best and text else text


def _escaped(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", printable(text))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1500px;
  margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 0.8em 0 } h2 { margin-top: 1.8em }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff }
[style*=right] { font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100% } p { max-width: 60em; color: #444 }
"""


def as_html(blocks: Sequence[Block]) -> str:
    """The Markdown as one HTML file with its picture inside, without scripts and links."""
    picture = picture_of(blocks)
    data = "" if picture is None else base64.b64encode(picture.png).decode()
    text = _markdown(blocks, f"data:image/png;base64,{data}")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    head = f'<meta charset="utf-8">\n<title>Comparison of runs</title>\n<style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def picture_of(blocks: Sequence[Block]) -> Picture | None:
    """The report's picture; None without one."""
    return next((block for block in blocks if isinstance(block, Picture)), None)

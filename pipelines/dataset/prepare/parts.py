"""A manifest that several calls make in parts: which parts there are and which are done.

They are recorded in the folder of what was probed, `<out>.parts`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.atomic_file import atomic_file
from pipelines.dataset.prepare.probe_listing import parts_folder
from pipelines.dataset.prepare.probe_log import Part
from pipelines.dataset.prepare.text_lines import read_json
from pipelines.errors import DataError
from pipelines.formatting import format_list, printable

PLAN = "plan.json"

MOST_PARTS = 100_000
_NAMED = 8  # parts that a message names


@dataclass(frozen=True)
class Plan:
    """How a manifest is made in parts."""

    parts: int
    """How many there are."""
    folder: str
    """In which the command was given."""
    command: list[str]
    """The arguments of `prepare` of one part."""


def parse_part(text: str) -> Part:
    """`2/8`, the second of eight parts, as (1, 8). Raises DataError for anything else."""
    part, slash, count = text.partition("/")
    digits = part.isdecimal() and count.isdecimal() and len(text) < 20
    if slash and digits and 1 <= int(part) <= int(count) <= MOST_PARTS:
        return int(part) - 1, int(count)
    raise DataError(f"--part {text}: expected I/N with I from 1 to N, such as 2/8")


def begin_part(out: Path, part: Part, command: Sequence[str]) -> None:
    """Record the plan, if this is the first part to begin.

    Args:
        command: the arguments of `prepare`.

    Raises:
        DataError: the manifest was begun with another number of parts or another command, from which `merge`
            would make another manifest; or the plan cannot be written.
    """
    path = parts_folder(out) / PLAN
    if path.is_file():
        before = _read_plan(path)
        if before.parts != part[1]:
            raise DataError(
                f"{printable(path.parent)} was begun with {before.parts} parts, not {part[1]}: give --part "
                f"I/{before.parts}, or remove that folder to begin again"
            )
        if _of_all_parts(before.command) != _of_all_parts(command):
            raise DataError(
                f"{printable(path.parent)} was begun with another command: "
                f"{printable(shlex.join(before.command))}. Give that one with each --part, or remove that "
                "folder to begin again"
            )
        return
    plan = Plan(part[1], str(Path.cwd()), list(command))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, shared=True) as new:
            new.write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be written: {error.strerror}") from error


def _of_all_parts(command: Sequence[str]) -> list[str]:
    """The arguments without those that may differ between parts, `--part` and `--workers`."""
    kept = []
    arguments = iter(command)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        # argparse accepts the beginning of a name that no other option has.
        if len(name) > 2 and ("--part".startswith(name) or "--workers".startswith(name)):
            if not equals:
                next(arguments, None)
        else:
            kept.append(argument)
    return kept


def end_part(out: Path, part: Part) -> None:
    """Record that a part is done."""
    _done(parts_folder(out), *part).touch()


def read_command(out: Path) -> list[str]:
    """The arguments of `prepare` of the parts of the manifest `out`, once all are done.

    Raises:
        DataError: no part was begun, some are not done, they were begun in another folder, or the record is
            damaged.
    """
    folder = parts_folder(out)
    if not (folder / PLAN).is_file():
        raise DataError(
            f"{printable(folder / PLAN)} does not exist: no part of {printable(out)} was begun. Give the "
            "command that makes it with --part I/N for each part first"
        )
    plan = _read_plan(folder / PLAN)
    if plan.folder != str(Path.cwd()):
        raise DataError(f"the parts were begun in {printable(plan.folder)}: merge them there")
    left = [
        f"{part + 1}/{plan.parts}"
        for part in range(plan.parts)
        if not _done(folder, part, plan.parts).exists()
    ]
    if left:
        raise DataError(
            f"{len(left)} of {plan.parts} parts of {printable(out)} are not done: --part "
            f"{format_list(left, _NAMED)}. Give the same command with each of them, which continues it"
        )
    return plan.command


def _done(folder: Path, part: int, parts: int) -> Path:
    return folder / f"part-{part + 1}-of-{parts}.done"


def _read_plan(path: Path) -> Plan:
    found = read_json(path)
    values = found if isinstance(found, dict) else {}
    parts, folder, command = (values.get(name) for name in ("parts", "folder", "command"))
    if (
        type(parts) is int
        and 1 <= parts <= MOST_PARTS
        and isinstance(folder, str)
        and isinstance(command, list)
        and all(isinstance(argument, str) for argument in command)
    ):
        return Plan(parts, folder, command)
    raise DataError(f"{printable(path)} is damaged; remove {printable(path.parent)} to begin again")

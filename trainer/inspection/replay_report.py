"""A replayed step as a contact sheet, as lines of text, and as JSON."""

from pathlib import Path
from typing import Any

from pipelines.batch_contents import format_changes
from trainer.inspection.batch_replay import ReplayedClip, ReplayedStep
from trainer.inspection.contact_sheet import SheetRow, draw_sheet, save_sheet


def write_replay(path: Path, done: ReplayedStep) -> None:
    """Write a sheet with a row for each shown clip: class, video, draw and augmentation beside its frames."""
    shown = [clip for clip in done.clips if len(clip.frames)]
    rows = [SheetRow(_text(clip, done), list(clip.frames.numpy())) for clip in shown]
    omitted = f", the first {len(shown)} shown" if len(shown) < len(done.clips) else ""
    title = f"step {done.step}: {len(done.clips)} clips{omitted}, hash {done.batch_hash}"
    columns = [f"frame {number + 1}" for number in shown[0].columns] if shown else []
    save_sheet(path, draw_sheet(title, rows, columns))


def report_lines(done: ReplayedStep) -> list[str]:
    """The result of the hash comparison, as lines of text."""
    recorded = None if done.recorded is None else done.recorded.batch_hash
    if done.equal:
        return [
            f"hash {done.batch_hash}: equal to the recorded one; these are the clips of the run",
            *done.notes,
        ]
    if done.equal is None:
        why = "the events lack the step" if done.recorded is None else "the run recorded no hash"
        return [f"hash {done.batch_hash}: not compared, because {why}", *done.notes]
    return [
        f"hash {done.batch_hash}: the run recorded {recorded}: the sampler chose the same clips, but the "
        "pixels differ. Possible reasons:",
        *(f"- {note}" for note in done.notes),
    ]


def as_json(done: ReplayedStep, sheet: Path) -> dict[str, Any]:
    return {
        "step": done.step,
        "batch_hash": done.batch_hash,
        "recorded_hash": None if done.recorded is None else done.recorded.batch_hash,
        "equal": done.equal,
        "notes": list(done.notes),
        "sheet": str(sheet),
        "clips": [
            {
                "path": clip.planned.path,
                "sample": clip.planned.slot.sample,
                "class": _class(clip, done),
                "valid": clip.valid,
                "epoch": clip.planned.slot.epoch,
                "draw": clip.planned.slot.draw,
                "repeat": clip.planned.slot.repeat,
                "frames": list(clip.planned.frames),
                "changes": format_changes(clip.planned.changes),
            }
            for clip in done.clips
        ],
    }


def _class(clip: ReplayedClip, done: ReplayedStep) -> str | None:
    return done.class_names[clip.planned.label] if clip.planned.label >= 0 else None


def _text(clip: ReplayedClip, done: ReplayedStep) -> list[str]:
    slot, frames = clip.planned.slot, ", ".join(map(str, clip.planned.frames))
    draw = f"epoch {slot.epoch}, draw {slot.draw}, repeat {slot.repeat}"
    return [
        (_class(clip, done) or "no class") + ("" if clip.valid else " (unreadable: a placeholder)"),
        clip.planned.path,
        f"{draw}, frames {frames}",
        ", ".join(format_changes(clip.planned.changes)),
    ]

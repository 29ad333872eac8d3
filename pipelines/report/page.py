"""The page: one HTML file without scripts and links, which a browser opens offline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipelines.dataset.prepare.class_names import printable_class
from pipelines.dataset.prepare.findings import format_reasons, without_numbers
from pipelines.formatting import format_list, format_size, printable
from pipelines.report.advice import choose_advice
from pipelines.report.charts import bar_chart, escaped, histogram, ranked_curve
from pipelines.report.copies import Copies
from pipelines.report.sample import Sample
from pipelines.report.speed import FRAMES, SIZE, Gain, Speed
from pipelines.report.survey import Survey

_BARS = 24  # classes up to which each has its bar
_SIZES = 8  # sizes, codecs and reasons that are shown
_NAMED = 3  # examples of a defect
_BUSY = 0.1  # share of the cores that other programs use, from which the page says it

_STYLE = """
:root { --ink: #1d2733; --soft: #5b6877; --line: #dfe5ec; --back: #f5f7fa; --card: #fff;
  --bar: #3b74b4; --more: #8fb3da; --warn: #b4541a; --fine: #2d7d55 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9aa7b5; --line: #323c48;
  --back: #161b21; --card: #1f262e; --bar: #6ea3dc; --more: #3f5f82; --warn: #e39a63; --fine: #6cc096 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 }
main { max-width: 1060px; margin: 0 auto; padding: 28px 24px 48px }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere } h2 { font-size: 16px; margin: 0 0 10px }
.under { color: var(--soft); margin: 0 0 22px; overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px;
  margin-top: 16px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px;
  min-width: 0 }
.wide { grid-column: 1 / -1 }
.figure { padding: 14px 12px }
.figure b { display: block; font-size: 20px; line-height: 1.3; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.figure span { color: var(--soft); font-size: 13px }
.advice { list-style: none; margin: 0; padding: 0 }
.advice li { border-left: 4px solid var(--fine); padding: 1px 0 1px 12px; margin: 0 0 12px }
.advice li:last-child { margin: 0 } .advice li.warn { border-color: var(--warn) }
.advice p, .note { margin: 0; color: var(--soft); font-size: 14px; overflow-wrap: anywhere }
.note { margin-top: 8px }
code { background: var(--back); border: 1px solid var(--line); border-radius: 4px; padding: 0 4px;
  font-size: 13px }
svg { display: block; width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif }
.bar { fill: var(--bar) } .bar.more { fill: var(--more) } .name { fill: var(--ink) }
.value { fill: var(--soft) } .axis { stroke: var(--line) }
.mark { stroke: var(--warn); stroke-dasharray: 4 3 }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 12px }
th, td { text-align: left; padding: 5px 10px 5px 0; border-top: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
th { border: 0; color: var(--soft); font-weight: 500 }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
@media (max-width: 520px) { .columns { grid-template-columns: 1fr } }
"""


def format_page(survey: Survey, sample: Sample, copies: Copies, speed: Speed, gain: Gain | None) -> str:
    """The page as HTML."""
    manifest = survey.manifest
    title = printable(manifest.path.name)
    weights = ", with weights" if manifest.weighted else ""
    under = f"{printable(manifest.path)}{weights}; fingerprint {manifest.fingerprint[:12]}"
    cards = [
        _card("What to do", _advice(survey, sample, copies, speed, gain), wide=True),
        _card("Classes", _classes(survey), wide=len(survey.classes) <= _BARS and len(survey.classes) > 12),
        _card("Speed on this machine", _speed(speed, gain)),
        _card("Durations", _durations(survey)),
        _card("Distance of keyframes", _keyframes(sample)),
        _card("Frame sizes", _top({f"{w} x {h}": n for (w, h), n in survey.sizes.items()}, survey.rows)),
        _card("Codecs", _top(survey.codecs, survey.rows) + _nvdec(sample)),
        _card("Defects", _defects(survey, sample), wide=True),
        _card("Duplicates", _duplicates(survey, copies), wide=True),
    ]
    body = (
        f'<h1>{escaped(title)}</h1>\n<p class="under">{escaped(under)}</p>\n'
        f'{_figures(survey, sample, speed)}\n<div class="columns">\n{"".join(cards)}</div>'
    )
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>"
    )
    page = f"<head>\n{head}\n</head>\n<body><main>\n{body}\n</main></body>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{page}\n</html>\n'


def _card(title: str, content: str, wide: bool = False) -> str:
    return f'<section class="card{" wide" * wide}"><h2>{escaped(title)}</h2>{content}</section>\n'


def _figures(survey: Survey, sample: Sample, speed: Speed) -> str:
    seconds = float(survey.seconds.sum(dtype=np.float64))
    known = [video.size for video in sample.videos if video.size is not None]
    taken = sum(not video.nvdec_refusal for video in sample.videos)
    figures = [
        (f"{len(survey.manifest):,}", "videos"),
        (f"{len(survey.classes):,}", "classes"),
        (_duration(seconds), "in all"),
        (format_size(float(np.mean(known)) * survey.rows) if known else "?", "on disk, estimated"),
        (f"{speed.clips_per_second:.3g}" if speed.clips_per_second else "?", "clips/s here"),
        (f"{taken / len(sample.videos):.0%}" if sample.videos else "?", "decoded by NVDEC"),
    ]
    cards = (f'<div class="card figure"><b>{value}</b><span>{name}</span></div>' for value, name in figures)
    return f'<div class="figures">{"".join(cards)}</div>'


def _advice(survey: Survey, sample: Sample, copies: Copies, speed: Speed, gain: Gain | None) -> str:
    items = []
    chosen = choose_advice(survey, sample, copies, speed, gain)
    # What is to be done first; otherwise in the order of importance.
    for advice in sorted(chosen, key=lambda each: not each.is_warning):
        text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escaped(advice.text))
        mark = ' class="warn"' if advice.is_warning else ""
        items.append(f"<li{mark}><b>{escaped(advice.title)}</b><p>{text}</p></li>")
    return f'<ul class="advice">{"".join(items)}</ul>'


def _classes(survey: Survey) -> str:
    counts = survey.classes
    if not len(counts):
        return _note("There is no class.")
    names = [printable_class(name) for name in survey.manifest.class_names]
    order = np.argsort(-counts, kind="stable").tolist()
    if len(counts) <= _BARS:
        return bar_chart([names[label] for label in order], counts[order].tolist(), _count)
    rows = [(names[label], f"{counts[label]:,}") for label in (*order[:4], *order[-4:])]
    return ranked_curve(counts, "classes, by their number of videos") + _table(
        ("The largest and the smallest", "Videos"), rows
    )


def _speed(speed: Speed, gain: Gain | None) -> str:
    if speed.problem or not speed.clips_per_second:
        return _note(f"Not measured: {speed.problem or 'it was not asked for'}.")
    rows = [("the sample, as it is", speed)]
    if gain is not None and gain.factor:
        rows += [
            (f"{gain.videos} videos, as is", gain.before),
            ("the same, transcoded", gain.after),
        ]
    chart = bar_chart(
        [name for name, _ in rows], [each.clips_per_second for _, each in rows], lambda rate: f"{rate:.3g}/s"
    )
    table = _table(
        ("CPU time of a clip", "Decoding", "The rest"),
        [(name, f"{each.decode_ms:.3g} ms", f"{each.other_ms:.3g} ms") for name, each in rows],
    )
    return (
        chart
        + table
        + _note(
            f"Training clips of {FRAMES} frames over the whole video, {SIZE} x {SIZE} pixels, decoded by the "
            f"CPU cores, without a model.{_busy([each for _, each in rows])}"
        )
    )


def _busy(speeds: Sequence[Speed]) -> str:
    """A sentence about other programs, if they took a notable share of the cores."""
    share = max(speed.others for speed in speeds)
    if share < _BUSY:
        return ""
    return f" Other programs used up to {share:.0%} of the cores: without them, clips/s would be higher."


def _durations(survey: Survey) -> str:
    if not len(survey.seconds):
        return _note("No row has a frame rate.")
    low, middle, high = np.percentile(survey.seconds, (5, 50, 95))
    text = (
        f"All have {middle:.3g} s."
        if survey.seconds.min() == survey.seconds.max()
        else f"Median {middle:.3g} s; 5th and 95th percentile {low:.3g} s and {high:.3g} s."
    )
    if unknown := survey.rows - len(survey.seconds):
        text += f" {unknown:,} have no frame rate."
    return histogram(survey.seconds, lambda value: f"{value:.3g}", "seconds") + _note(text)


def _keyframes(sample: Sample) -> str:
    if not sample.videos:
        return _note("No video could be opened.")
    distances = np.array([video.keyframe_distance for video in sample.videos])
    chart = histogram(distances, lambda value: f"{value:.0f}", "most frames from one keyframe to the next")
    return chart + _note(
        f"Median {np.median(distances):.0f}. A frame costs the decoding of all frames since the keyframe "
        "before it."
    )


def _top(counts: Counter[str] | dict[str, int], rows: int) -> str:
    top = Counter(counts).most_common(_SIZES)
    chart = bar_chart([name or "unknown" for name, _ in top], [count for _, count in top], _count)
    rest = len(counts) - len(top)
    return chart + (_note(f"And {rest:,} more, of {rows - sum(n for _, n in top):,} videos.") if rest else "")


def _nvdec(sample: Sample) -> str:
    refused = Counter(video.nvdec_refusal for video in sample.videos if video.nvdec_refusal)
    if not sample.videos:
        return ""
    if not refused:
        return _note("NVDEC decodes all opened videos.")
    reasons = [(reason, f"{count:,}") for reason, count in refused.most_common(_SIZES)]
    return _table((f"Not for NVDEC, of {len(sample.videos):,} opened", "Videos"), reasons)


def _defects(survey: Survey, sample: Sample) -> str:
    content = ""
    problems = survey.verification.problems
    wrong = [kind for kind in problems.kinds() if not kind.startswith("path: a video")]
    if wrong:
        rows = [(kind, f"{problems.counted(kind):,}") for kind in wrong]
        content += _table(("Wrong in the manifest, by column", "Values"), rows)
    by_reason: dict[str, list[tuple[int, str]]] = {}
    for index, reason in sample.defects:
        by_reason.setdefault(without_numbers(reason), []).append((index, reason))
    if by_reason:
        ranked = sorted(by_reason.values(), key=len, reverse=True)
        found = []
        for defects in ranked[: 2 * _SIZES]:
            named = ", ".join(survey.manifest.printable_path(index) for index, _ in defects[:_NAMED])
            reason = format_reasons(defects[0][1], len({reason for _, reason in defects}) > 1)
            found.append((reason, named, f"{len(defects):,}"))
        content += _table((f"Of {len(sample):,} opened videos", "Such as", "Videos"), found)
    checked = f"Every row was checked, and {len(sample):,} videos were opened, evenly over the manifest."
    return content + _note(checked if content else f"None found. {checked}")


def _duplicates(survey: Survey, copies: Copies) -> str:
    manifest, verification = survey.manifest, survey.verification
    content = ""
    if verification.repeated_rows:
        kinds = [kind for kind in verification.problems.kinds() if kind.startswith("path: a video")]
        rows = [(kind.removeprefix("path: "), f"{verification.problems.counted(kind):,}") for kind in kinds]
        content = _table(("Rows with", "Rows"), rows) + _note("`prepare verify` lists them.")
    else:
        content = _note("No row repeats the video of another row.")
    shown = []
    for group in copies.found[: 2 * _SIZES]:
        classes = {manifest.row(index).label for index in group}
        names = format_list([manifest.printable_path(index) for index in group[:_NAMED]], _NAMED, len(group))
        labels = format_list([printable_class(manifest.class_names[c]) for c in sorted(classes)], _NAMED)
        shown.append((names, labels, f"{len(group):,}"))
    if shown:
        rest = len(copies.found) - len(shown)
        content += _table(("Copies of one video", "Class", "Files"), shown)
        content += _note(f"And {rest:,} more videos with copies.") if rest else ""
    if not copies.compared and copies.candidates:
        return content + _note("Copies under other names were not searched for (`--copies 0`).")
    part = (
        f"{copies.compared:,} of {copies.candidates:,}; `--copies {copies.candidates}` compares all"
        if copies.compared < copies.candidates
        else f"{copies.compared:,}, all of them"
    )
    return content + _note(
        f"{'' if shown else 'No copy under another name was found. '}Of {copies.videos:,} videos, those with "
        "the same frames, size, codec and rate as another were compared by size and by the first, middle and "
        f"last 16 KiB: {part}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its last column is aligned to the right, and so are others of milliseconds."""
    last = len(head) - 1
    marks = [
        ' class="n"' if number == last or (number and any(" ms" in row[number] for row in rows)) else ""
        for number in range(len(head))
    ]

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{m}>{escaped(c)}</{tag}>" for m, c in zip(marks, cells, strict=True))

    lines = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{line(head, 'th')}</tr>{lines}</table>"


def _note(text: str) -> str:
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", escaped(text))
    return f'<p class="note">{marked}</p>'


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"

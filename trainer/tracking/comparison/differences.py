"""Differences between runs: fields of the recipes, seeds alone, and the data.

A batch is a function of (fingerprint of the manifests, seed, step and the recipe's fields for sampling and
augmentation): where these are equal, so are the batches, for any number of ranks. Where both runs recorded a
hash of each batch, these are compared too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from models.config import PRESETS
from trainer.tracking.comparison.events import batch_hashes
from trainer.tracking.comparison.runs import FINGERPRINTS, ComparedRun

NAMES = ("name", "run.dir")
"""Fields that name a run and its path: never listed as a difference."""
_NOT_OF_THE_TRAINING = (*NAMES, "seed")
_BOOKKEEPING = "tracking."
_FINGERPRINT_FIELDS = dict(
    zip(FINGERPRINTS, ("data.train (fingerprint)", "data.val (fingerprint)"), strict=True)
)


Group = tuple[int, ...]
"""Runs that differ in their seed alone: indices in the list of runs."""


@dataclass(frozen=True)
class Difference:
    """A field that is not the same in all runs."""

    section: str
    field: str
    values: tuple[str | None, ...]
    """Of each run; None where its recipe does not have the field."""


def fields_of(run: ComparedRun) -> dict[str, str]:
    """The recipe's fields, and the manifests' fingerprints as fields."""
    found = {_FINGERPRINT_FIELDS[name]: value[:12] for name, value in run.data.items()}
    return {**run.recipe, **found}


def differences(runs: Sequence[ComparedRun]) -> list[Difference]:
    """Fields that differ, by section in the recipe's order. Runs without a recipe are ignored."""
    every = [fields_of(run) for run in runs]
    known = [fields for fields, run in zip(every, runs, strict=True) if run.recipe]
    names = list(dict.fromkeys(name for fields in known for name in fields))
    found = []
    for name in names:
        if name in NAMES:
            continue
        values = {fields.get(name) for fields in known}
        if name in _FINGERPRINT_FIELDS.values():
            values.discard(None)  # not recorded by a run, so unknown
        if len(values) > 1:
            section = name.partition(".")[0] if "." in name else "recipe"
            found.append(Difference(section, name, tuple(fields.get(name) for fields in every)))
    order = list(dict.fromkeys(difference.section for difference in found))
    return sorted(found, key=lambda difference: order.index(difference.section))


def seed_groups(runs: Sequence[ComparedRun]) -> list[Group]:
    """Groups of two runs or more that differ in their seed alone, in the order of their first run."""
    by_training: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, run in enumerate(runs):
        if run.recipe:
            fields = fields_of(run)
            training = {
                name: value
                for name, value in fields.items()
                if name not in _NOT_OF_THE_TRAINING and not name.startswith(_BOOKKEEPING)
            }
            by_training.setdefault(tuple(sorted(training.items())), []).append(index)
    return [tuple(members) for members in by_training.values() if len(members) > 1]


# --- the data -------------------------------------------------------------------------------------------

SAME = "same manifests, same seed, same batches"

_ORDER = (
    "seed", "optimisation.global_batch", "sampling.repeats", "sampling.shuffle",
)  # fmt: skip
"""Fields that determine the order of the videos."""
_CLIPS = ("model.frames", "augmentation.")
"""Fields that determine the clips of a video, together with the resolution."""
_NOT_OF_CLIPS = ("augmentation.flip_left_right",)
_VIEWS = ("evaluation.clips", "evaluation.crops")


Hashes = tuple[np.ndarray, np.ndarray] | None
"""Steps and digests of their batches, see `batch_hashes`; None where a run has none."""


def data_comparer(one: ComparedRun) -> Callable[[ComparedRun], str]:
    """Returns a function that describes how another run's data differ from this one's, as text.

    Differing values are `this one's / the other's`. This one's events are read once at most.
    """
    own = cache(partial(_hashes_of, one))
    return lambda other: _compared(one, other, own)


def _compared(one: ComparedRun, other: ComparedRun, own: Callable[[], Hashes]) -> str:
    if not one.recipe or not other.recipe:
        return "not known: a recipe is missing"
    parts = [_training_data(one, other)]
    hashes = _compare_hashes(own(), _hashes_of(other))
    if hashes:
        parts.append(hashes)
    val = one.data.get("val_fingerprint"), other.data.get("val_fingerprint")
    if None not in val and val[0] != val[1]:
        parts.append("other validation manifests: their accuracies are of different videos")
    views = _differing(one.recipe, other.recipe, _VIEWS)
    if views:
        parts.append(f"evaluated with other views: {', '.join(views)}")
    return "; ".join(parts)


def _training_data(one: ComparedRun, other: ComparedRun) -> str:
    fingerprints = one.data.get("train_fingerprint"), other.data.get("train_fingerprint")
    order = _differing(one.recipe, other.recipe, _ORDER)
    ratios = _ratios(one), _ratios(other)
    if ratios[0] != ratios[1]:
        order.append(f"ratios in data.train ({ratios[0]} / {ratios[1]})")
    names = [name for name in {**one.recipe, **other.recipe} if name.startswith(_CLIPS)]
    clips = _differing(one.recipe, other.recipe, [name for name in names if name not in _NOT_OF_CLIPS])
    sizes = _resolution(one), _resolution(other)
    if sizes[0] != sizes[1]:
        clips.append(f"resolution ({sizes[0]} / {sizes[1]})")
    decoder = _differing(one.recipe, other.recipe, ("data.decoder",))
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        return _joined("other training manifests", "other order", order)
    if None in fingerprints:
        known = "whether the manifests are the same is not recorded"
        return _joined(known, "other order", order) if order else _joined(known, "other clips", clips)
    if order:
        return f"same manifests, other batches: {', '.join(order)}"
    if clips:
        return f"same manifests, same videos in the same order, other clips of them: {', '.join(clips)}"
    return f"{SAME}, but for rounding in decoding: {', '.join(decoder)}" if decoder else SAME


def _joined(text: str, what: str, differing: Sequence[str]) -> str:
    return f"{text}; {what}: {', '.join(differing)}" if differing else text


def _differing(one: dict[str, str], other: dict[str, str], names: Sequence[str]) -> list[str]:
    return [
        f"{name} ({one.get(name, '-')} / {other.get(name, '-')})"
        for name in names
        if one.get(name) != other.get(name)
    ]


def _ratios(run: ComparedRun) -> str | None:
    """The ratios of several training manifests as text; None of one, or without ratios."""
    try:
        parts = json.loads(run.recipe.get("data.train", ""))
        ratios = [part["ratio"] for part in parts]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (f"{ratio:g}" if isinstance(ratio, int | float) else "?" for ratio in ratios)
    return None if None in ratios else ":".join(texts)


def _resolution(run: ComparedRun) -> str | None:
    preset = PRESETS.get(run.recipe.get("model.preset", ""))
    own = run.recipe.get("model.overrides.resolution")
    return own if own is not None else None if preset is None else str(preset.get("resolution"))


def _hashes_of(run: ComparedRun) -> Hashes:
    if run.folder is None:
        return None
    try:
        return batch_hashes(run.folder / "events.jsonl")
    except (OSError, ValueError):
        return None  # `read_folder` noted it


def _compare_hashes(first: Hashes, second: Hashes) -> str | None:
    """Compares the recorded hashes of batches; None where one of the runs has none."""
    if first is None or second is None:
        return None
    steps, mine, theirs = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
    if not steps.size:
        return "no step has a batch hash in both"
    differ = np.flatnonzero(first[1][mine] != second[1][theirs])
    if not differ.size:
        return f"the batch hashes of all {steps.size:,} steps that both recorded are the same"
    return (
        f"the batch hashes first differ at step {steps[differ[0]]:,}, and in {differ.size:,} of "
        f"{steps.size:,} steps that both recorded"
    )

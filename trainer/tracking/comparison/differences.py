"""In which fields recipes differ, and which runs are one training with several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.tracking.comparison.runs import FINGERPRINTS, ComparedRun

NAMES = ("name", "run.dir")
"""Fields that say where a run lies, and nothing else: never shown as a difference."""
_NOT_OF_THE_TRAINING = (*NAMES, "seed")
_BOOKKEEPING = "tracking."
_FINGERPRINT_FIELDS = dict(
    zip(FINGERPRINTS, ("data.train (fingerprint)", "data.val (fingerprint)"), strict=True)
)


@dataclass(frozen=True)
class Difference:
    """A field that is not the same in all runs. values: each run's; None where a run does not have it."""

    section: str
    field: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but their seed. members: places in the list of runs."""

    members: tuple[int, ...]


def fields_of(run: ComparedRun) -> dict[str, str]:
    """The recipe's fields, and the manifests' fingerprints under names of their own."""
    found = {_FINGERPRINT_FIELDS[name]: value[:12] for name, value in run.data.items()}
    return {**run.recipe, **found}


def differences(runs: Sequence[ComparedRun]) -> list[Difference]:
    """Fields that differ, by section in the recipe's order. A run without a recipe differs in nothing."""
    every = [fields_of(run) for run in runs]
    known = [fields for fields, run in zip(every, runs, strict=True) if run.recipe]
    names = list(dict.fromkeys(name for fields in known for name in fields))
    found = []
    for name in names:
        if name in NAMES:
            continue
        values = {fields.get(name) for fields in known}
        if name in _FINGERPRINT_FIELDS.values():
            values.discard(None)  # of a run that did not record it: nothing is known
        if len(values) > 1:
            section = name.partition(".")[0] if "." in name else "recipe"
            found.append(Difference(section, name, tuple(fields.get(name) for fields in every)))
    order = list(dict.fromkeys(difference.section for difference in found))
    return sorted(found, key=lambda difference: order.index(difference.section))


def seed_groups(runs: Sequence[ComparedRun]) -> list[SeedGroup]:
    """Groups of two runs or more, in the order of their first run."""
    by_training: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for place, run in enumerate(runs):
        if run.recipe:
            fields = fields_of(run)
            training = {
                name: value
                for name, value in fields.items()
                if name not in _NOT_OF_THE_TRAINING and not name.startswith(_BOOKKEEPING)
            }
            by_training.setdefault(tuple(sorted(training.items())), []).append(place)
    return [SeedGroup(tuple(members)) for members in by_training.values() if len(members) > 1]

"""Which row of a trained model's head belongs to which class of a manifest."""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache

from models.weights.row_maps import NO_SYNONYMS, match_rows, normalise_name
from models.weights.safetensors_header import shorten
from pipelines.dataset import kinetics710
from trainer.errors import RunError

_SHOWN = 5  # differences that an error message lists


def match_rows_by_name(head: Sequence[str | None], wanted: Sequence[str]) -> tuple[int | None, ...]:
    """For each wanted class its row in a head of these classes, or None.

    The comparison ignores case, underscores and blanks. Where the head's classes or the wanted ones are all
    Kinetics classes, it also uses the synonyms between the versions of Kinetics.
    """
    return match_rows(head, wanted, synonyms_between(head, wanted))


def synonyms_between(head: Sequence[str | None], wanted: Sequence[str]) -> Mapping[str, str]:
    """Kinetics synonyms if all classes of one side are from Kinetics: elsewhere "hugging" may differ."""
    known = _kinetics()
    sides = ([name for name in head if name is not None], wanted)
    of_kinetics = any(names and all(normalise_name(name) in known for name in names) for names in sides)
    return kinetics710.synonyms() if of_kinetics else NO_SYNONYMS


@cache
def _kinetics() -> frozenset[str]:
    return frozenset(map(normalise_name, kinetics710.all_names()))


def find_head_rows(model_classes: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    """For each class of a manifest its row in the head of a model, for an evaluation.

    model_classes: the model's classes, in the order of the rows of its head. wanted: the manifest's classes,
    in the order of the labels. See `match_rows_by_name`.

    Raises RunError, with the first differences, where the model lacks some of the classes.
    """
    rows = match_rows_by_name(model_classes, wanted)
    absent = [name for name, row in zip(wanted, rows, strict=True) if row is None]
    if not absent:
        return tuple(row for row in rows if row is not None)
    lines = [_nearest(name, model_classes) for name in absent[:_SHOWN]]
    if len(absent) > _SHOWN:
        lines.append(f"... and {len(absent) - _SHOWN:,} more")
    hint = (
        "Class names that are only numbers cannot be matched: make the manifest again with --classes"
        if all(name.isdecimal() for name in wanted)
        else "Evaluate on a manifest of the model's classes, or train the model on these (model.weights)"
    )
    raise RunError(
        f"{len(absent):,} of the manifest's {len(wanted):,} classes are not among the model's "
        f"{len(model_classes):,}:\n  " + "\n  ".join(lines) + f"\n{hint}"
    )


def _nearest(name: str, model_classes: Sequence[str]) -> str:
    by_plain = {normalise_name(known): known for known in model_classes}
    near = difflib.get_close_matches(normalise_name(name), list(by_plain), n=1, cutoff=0.75)
    return repr(shorten(name)) + (f"; the model has {shorten(by_plain[near[0]])!r}" if near else "")

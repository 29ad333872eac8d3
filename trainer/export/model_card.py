"""The model card of an export, from the files of the run."""

import re
from collections import Counter
from typing import Any

import yaml

from models.cost import multiply_accumulates, parameter_count
from pipelines.formatting import printable
from trainer.checkpoint.retention import read_accuracies
from trainer.export.export_source import ExportSource
from trainer.export.public_metadata import public_recipe
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import read_json
from trainer.system.formatting import format_percent

_FINGERPRINT = "data.train (fingerprint)"
_SHOWN_CLASSES = 20
_UNKNOWN = "not known"
_LICENCE_FIELD = "license:  # to be filled in by the publisher of this model"
_LICENCE = "Not chosen yet: the publisher of this model fills in `license` at the top of this file."


def model_card(source: ExportSource) -> str:
    """README.md with YAML front matter.

    Facts that no file of the run has are written as not known. Machines are described by their hardware,
    paths by their last part. The publisher of the model chooses the licence, and the card says so.
    """
    recipe = public_recipe(source.weights.recipe)
    accuracies = {} if source.run is None else read_accuracies(source.run / "checkpoints")
    own = accuracies.get(source.step or -1) if source.as_evaluated else None
    sections = {
        "Use": _use(source),
        "Results": _results(source, accuracies, own),
        "Training": _training(source, recipe),
        "Licence": [_LICENCE],
        "Recipe": ["```yaml", _yaml(recipe), "```"] if recipe else [_UNKNOWN],
    }
    lines = [
        "---",
        _LICENCE_FIELD,
        _yaml(_front_matter(source, recipe, own)),
        "---",
        "",
        f"# {_inline(source.name)}",
        "",
    ]
    lines += _description(source)
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _front_matter(source: ExportSource, recipe: dict[str, Any], own: float | None) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "uniformerv2-trainer",
        "pipeline_tag": "video-classification",
        "tags": ["uniformerv2", "video-classification"],
        "metrics": ["accuracy"],
    }
    if own is not None:
        dataset = {"type": "video-folder", "name": ", ".join(_manifests(recipe, "val")) or _UNKNOWN}
        metric = {"type": "accuracy", "name": "top-1", "value": round(own, 4)}
        task = {"type": "video-classification"}
        results = [{"task": task, "dataset": dataset, "metrics": [metric]}]
        front["model-index"] = [{"name": source.name, "results": results}]
    return front


def _description(source: ExportSource) -> list[str]:
    config, names = source.weights.model.config, source.weights.class_names
    more = f", and {len(names) - _SHOWN_CLASSES} more (`config.json`)" if len(names) > _SHOWN_CLASSES else ""
    return [
        f"A [UniFormerV2](https://arxiv.org/abs/2211.09552) of {parameter_count(config):,} parameters that "
        f"classifies clips of {config.frames} frames of {config.resolution} x {config.resolution} pixels "
        f"into {len(names)} classes, with {multiply_accumulates(config) / 1e9:.4g} GMACs a clip.",
        "",
        f"Classes: {', '.join(map(_inline, names[:_SHOWN_CLASSES]))}{more}.",
    ]


def _use(source: ExportSource) -> list[str]:
    preprocessing = source.weights.preprocessing
    short_side = preprocessing.get("max_short_side")
    scaled = f"Frames are first scaled down to a short side of {short_side}. " if short_side else ""
    return [
        "```python",
        "import uniformerv2  # pip install uniformerv2-trainer",
        'model = uniformerv2.load("FOLDER").model  # FOLDER holds this file; clips B 3 T H W -> logits',
        "```",
        "",
        f"A clip has {preprocessing.get('frames', _UNKNOWN)} frames (sampling: "
        f"{preprocessing.get('sampling', _UNKNOWN)}). {scaled}The short side is resized to the model's "
        "resolution, a centre square is cropped, and values from 0 to 1 are normalised with mean "
        f"{preprocessing.get('mean', _UNKNOWN)} and standard deviation {preprocessing.get('std', _UNKNOWN)} "
        "(`preprocessor_config.json`).",
    ]


def _results(source: ExportSource, accuracies: dict[int, float], own: float | None) -> list[str]:
    if not accuracies:
        return [f"Accuracy: {_UNKNOWN}; the source has no evaluation of these weights."]
    rows = {"these weights": (source.step, own)}
    best, last = max(accuracies, key=accuracies.__getitem__), max(accuracies)
    rows |= {
        "best evaluation of the run": (best, accuracies[best]),
        "last one": (last, accuracies[last]),
    }
    lines = ["| | after step | top-1 |", "|---|---|---|"]
    for what, (step, top1) in rows.items():
        lines.append(f"| {what} | {step} | {_UNKNOWN if top1 is None else format_percent(top1)} |")
    summary = read_json(RunDir(source.run).summary) if source.run is not None else {}
    if summary.get("top5") is not None and summary.get("videos"):
        lines += [
            "",
            f"At the end of the run top-5 was {format_percent(summary['top5'])} of "
            f"{summary['videos']:,} videos.",
        ]
    return lines


def _training(source: ExportSource, recipe: dict[str, Any]) -> list[str]:
    machine = read_json(RunDir(source.run).environment) if source.run is not None else {}
    summary = read_json(RunDir(source.run).summary) if source.run is not None else {}
    optimisation = recipe.get("optimisation", {})
    gpus = Counter(machine.get("gpus") or ())
    hardware = ", ".join(f"{count} x {name}" for name, count in gpus.items()) or machine.get("cpu")
    packages = machine.get("packages") or {}
    facts = {
        "training data": ", ".join(_manifests(recipe, "train")),
        "fingerprint of the training data": source.settings.get(_FINGERPRINT),
        "validation data": ", ".join(_manifests(recipe, "val")),
        "recipe": recipe.get("name"),
        "steps": source.step,
        "global batch": optimisation.get("global_batch"),
        "learning rate": _learning_rate(optimisation),
        "initial weights": _initial_weights(recipe),
        "processes": source.ranks,
        "hardware of the first node": hardware,
        "duration of the run": summary.get("spent"),
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
        "commit of the trainer": machine.get("commit"),
    }
    lines = ["| | |", "|---|---|"]
    return lines + [f"| {name} | {_inline(str(value or _UNKNOWN))} |" for name, value in facts.items()]


def _learning_rate(optimisation: dict[str, Any]) -> str | None:
    """The recipe's rate; with `reference_batch`, the number of clips that it belongs to."""
    rate, batch = optimisation.get("learning_rate"), optimisation.get("reference_batch")
    return f"{rate} for {batch} clips, scaled to the global batch" if rate and batch else rate


def _initial_weights(recipe: dict[str, Any]) -> str | None:
    model = recipe.get("model")
    if model is None:
        return None
    # Earlier versions' recipes have `image_weights`.
    return model.get("weights") or model.get("image_weights") or "random weights"


def _manifests(recipe: dict[str, Any], role: str) -> list[str]:
    """The training (`train`) or validation (`val`) manifests, in any form that a recipe allows."""
    found = recipe.get("data", {}).get(role) or []
    entries = found if isinstance(found, list) else [found]
    return [str(entry.get("manifest") if isinstance(entry, dict) else entry) for entry in entries]


def _inline(text: str) -> str:
    """Text as one line of Markdown, with its markup escaped."""
    return re.sub(r"[`*_<>|\[\]#&]", lambda sign: f"\\{sign[0]}", printable(text))


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()

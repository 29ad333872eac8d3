"""Parameters and multiply-accumulates that the paper and the released implementation state."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from models import UniFormerV2Config, build_config

_UNITS = {"": 1, "M": 10**6, "G": 10**9, "T": 10**12}
_NOT_OF_THE_COST = {
    "num_classes", "activation", "norm_eps", "ln_pre", "patch_bias", "qkv_bias", "layer_scale",
    "absolute_positions", "relative_positions", "frame_feature", "global_mlp_dropout", "head_dropout",
    "drop_path", "global_drop_path", "recomputed_blocks",
}  # fmt: skip
"""Fields that change no published figure: below its last digit, or not at all."""


@dataclass(frozen=True)
class Figure:
    """A published number, as printed: `115 M`, `1.8 T`, `114,552,208`."""

    text: str

    @property
    def value(self) -> float:
        return self._number * self._unit

    def agrees(self, ours: float) -> bool:
        """Whether `ours` is the printed number when rounded to its digits; of one in the middle, either."""
        decimals = len(self.text.split()[0].partition(".")[2])
        return abs(ours - self.value) <= 0.5 * self._unit * 10**-decimals * (1 + 1e-9)

    @property
    def _number(self) -> float:
        return float(self.text.split()[0].replace(",", ""))

    @property
    def _unit(self) -> int:
        return _UNITS[self.text.partition(" ")[2]]


@dataclass(frozen=True)
class PublishedCost:
    """A row of a table of costs."""

    source: str
    model: Mapping[str, Any]
    """Arguments of `build_config`."""
    crops: int
    clips: int
    parameters: Figure
    """All, of a frozen model in the paper the trained ones."""
    flops: Figure
    """Multiply-accumulates of all crops and clips, which the paper calls FLOPs."""
    note: str = ""
    """Why the model built here differs by more than 2 %, other than by rounding."""

    @property
    def views(self) -> int:
        return self.crops * self.clips

    @property
    def config(self) -> UniFormerV2Config:
        return build_config(**self.model)

    @property
    def classes(self) -> set[int]:
        """The numbers of classes that the row is published for."""
        if self.source == RELEASED:
            return {self.model["num_classes"]}
        tables = map(int, re.findall(r"[0-9]+", self.source))
        return {count for table in tables for count in _CLASSES_OF_TABLE[table]}

    @property
    def counts_trained(self) -> bool:
        """Whether `parameters` are the trained ones only."""
        return self.config.frozen_backbone and self.source != RELEASED


RELEASED = "released implementation"
_CLASSES_OF_TABLE = {
    1: (400,),
    2: (600, 700),
    3: (339,),
    4: (174,),
    15: (174,),
    16: (400, 600, 700),
    17: (339,),
    18: (174,),
}
"""Kinetics, Moments in Time and Something-Something."""


def published_costs() -> Iterator[PublishedCost]:
    """All rows: of the released implementation, then of the paper's tables 1 to 4, 15, and 16 to 18."""
    for preset, form, frames, classes, parameters, gmacs in (
        ("b16", "scene", 8, 400, "114,552,208", "148.1 G"),
        ("b16", "scene", 16, 400, "114,552,208", "296.2 G"),
        ("l14", "scene", 8, 400, "354,099,600", "665.6 G"),
        ("l14", "scene", 32, 400, "354,099,600", "2662.4 G"),
        ("l14_336", "scene", 8, 400, "354,427,280", "1567.0 G"),
        ("l14_336", "scene", 64, 400, "354,427,280", "12535.6 G"),
        ("l14_336", "frozen", 8, 400, "354,426,256", "1567.0 G"),
        ("b16", "temporal", 16, 174, "162,992,814", "187.2 G"),
        ("l14", "temporal", 16, 174, "573,949,966", "858.2 G"),
        ("l14", "temporal", 32, 174, "573,949,966", "1716.2 G"),
    ):
        yield PublishedCost(
            RELEASED, _model(preset, form, frames, classes), 1, 1, Figure(parameters), Figure(gmacs)
        )
    for source, preset, form, frames, views, parameters, flops in _PAPER:
        crops, clips = map(int, views.split("x"))
        model = _model(preset, form, frames, 174 if form == "temporal" else 400)
        if preset == "l16":
            model["backbone"] = "beit"
        note = _NOTES.get((preset, form, frames, views), "")
        yield PublishedCost(
            source, model, crops, clips, Figure(f"{parameters} M"), Figure(f"{flops} T"), note
        )
    for overrides, parameters, flops in _TABLE_15:
        model = _model("b16", "scene", 8, 174) | {"global_layers": (), **overrides}
        yield PublishedCost("table 15", model, 3, 1, Figure(f"{parameters} M"), Figure(f"{flops} G"))


# Table, preset, form, frames, crops x clips, parameters in M, FLOPs in T. The order of crops and clips in the
# tables is not consistent; the product is what counts.
_PAPER = (
    ("table 1", "b16", "scene", 16, "3x4", "115", "3.6"),
    ("table 1", "l16", "scene", 32, "3x2", "355", "12.2"),
    ("tables 1, 16", "b16", "scene", 8, "3x4", "115", "1.8"),
    ("tables 1, 16", "b16", "scene", 8, "1x3", "115", "0.4"),
    ("table 17", "b16", "scene", 32, "3x4", "115", "7.2"),
    ("table 16", "l14", "scene", 8, "1x3", "354", "2.0"),
    ("tables 1, 16, 17", "l14", "scene", 8, "3x4", "354", "8.0"),
    ("table 16", "l14", "scene", 16, "3x1", "354", "4.0"),
    ("tables 16, 17", "l14", "scene", 16, "3x4", "354", "16.0"),
    ("table 16", "l14", "scene", 32, "3x1", "354", "16.0"),
    ("tables 1, 2, 16", "l14", "scene", 32, "3x2", "354", "16.0"),
    ("tables 16, 17", "l14", "scene", 32, "3x4", "354", "32.0"),
    ("tables 3, 17", "l14_336", "scene", 8, "3x4", "354", "18.8"),
    ("tables 1, 2, 16", "l14_336", "scene", 32, "3x2", "354", "37.6"),
    ("table 16", "l14_336", "scene", 32, "3x4", "354", "75.3"),
    ("tables 1, 2, 16", "l14_336", "scene", 64, "3x2", "354", "75.3"),
    ("table 16", "l14_336", "scene", 64, "3x4", "354", "150.6"),
    ("tables 1, 16", "l14_336", "frozen", 8, "1x3", "51", "4.7"),
    ("tables 1, 2, 16", "l14_336", "frozen", 32, "3x1", "51", "18.8"),
    ("table 16", "l14_336", "frozen", 32, "3x4", "51", "75.3"),
    ("tables 4, 18", "b16", "temporal", 16, "3x1", "163", "0.6"),
    ("table 18", "b16", "temporal", 16, "3x2", "163", "1.1"),
    ("tables 4, 18", "b16", "temporal", 32, "3x1", "163", "1.1"),
    ("table 18", "b16", "temporal", 32, "3x2", "163", "2.2"),
    ("tables 4, 18", "l14", "temporal", 16, "3x1", "574", "2.6"),
    ("table 18", "l14", "temporal", 16, "3x2", "574", "5.2"),
    ("tables 4, 18", "l14", "temporal", 32, "3x1", "574", "5.2"),
    ("table 18", "l14", "temporal", 32, "3x2", "574", "10.3"),
)
_HALF = (
    "Table 16 has 16.0 T for 32 frames of L/14 with 3 views, and the same for 6 views; for 3 views it would "
    "be half, as its other rows are proportional to frames and views."
)
_NOTES = {("l14", "scene", 32, "3x1"): _HALF}
_TABLE_15: tuple[tuple[dict[str, Any], str, str], ...] = (  # B/16, 8 frames; FLOPs in G of 3 views
    ({}, "86", "422"),
    ({"temporal_module": "temporal_mhsa"}, "114", "555"),
    ({"temporal_module": "joint_mhsa"}, "86", "539"),
    ({"temporal_module": "temporal_convolution"}, "86", "422"),
    ({"temporal_module": "temporal_shift"}, "86", "422"),
    ({"temporal_module": "temporal_transformer"}, "128", "423"),
    ({"local_mhra": 2}, "105", "511"),
)


def _model(preset: str, form: str, frames: int, classes: int) -> dict[str, Any]:
    frozen = {"frozen_backbone": True} if form == "frozen" else {}
    form = "scene" if frozen else form
    return {"preset": preset, "form": form, "frames": frames, "num_classes": classes, **frozen}


def costs_of(config: UniFormerV2Config) -> list[PublishedCost]:
    """The rows of models with this structure and number of classes, whatever their image weights."""
    structure = _structure(config)
    return [row for known, row in _by_structure() if known == structure and config.num_classes in row.classes]


@cache
def _by_structure() -> list[tuple[dict[str, Any], PublishedCost]]:
    return [(_structure(row.config), row) for row in published_costs()]


def _structure(config: UniFormerV2Config) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_OF_THE_COST}
